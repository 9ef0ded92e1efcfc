"""What the documentation says is there: links, anchors, commands, flags, names; and what it prints works."""

import ast
import importlib.util
import re
import shlex
from argparse import ArgumentParser
from pathlib import Path

import pytest
from test_readme import code_blocks
from test_readme_commands import clone, commands_of, run  # noqa: F401  clone is a fixture
from transformers import HfArgumentParser

from mixlm.cli import build_parser
from mixlm.training.arguments import PretrainingArguments
from mixlm.training.reading import ReadingArguments
from mixlm.training.retrieval import RetrievalArguments

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/README.md", "mixlm/sample/README.md")
    for path in REPOSITORY.glob(pattern)
)
# Generated, and a record of measurements: in English alone.
ONE_LANGUAGE = {"api.md", "experiments.md"}
SCRIPTS = {
    "run_pretraining.py": PretrainingArguments,
    "run_mrc.py": ReadingArguments,
    "run_ict.py": RetrievalArguments,
}
of_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def without_code(text: str) -> str:
    """The text without fenced blocks and what stands between backquotes."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def code_of(page: Path) -> list[str]:
    """The blocks without comments and docstrings, which are translated."""
    return [re.sub(r'\n *""".*?"""', "", block, flags=re.DOTALL) for block in code_blocks(page.read_text("utf-8"))]


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


def commands(page: Path) -> list[list[str]]:
    """The words of each command line of the page, without prompt and comment."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line[2:], comments=True) for line in lines if line.startswith("$ ")]


def programs(words: list[str]) -> list[tuple[str, list[str]]]:
    """`mixlm` or a script of this repository that a command starts, with its arguments."""
    return [
        (word, words[place + 1 :])
        for place, word in enumerate(words)
        if word.endswith(".py") or (word == "mixlm" and place == 0)
    ][:1]


def parser_of(parser: ArgumentParser, words: list[str]) -> ArgumentParser:
    """The parser of the verb, and of its own verb, with which the words begin."""
    for action in parser._subparsers._group_actions if parser._subparsers else ():
        assert words and words[0] in action.choices, f"no verb {words[:1]}"
        return parser_of(action.choices[words[0]], words[1:])
    return parser


def require_options(parser: ArgumentParser, words: list[str]) -> None:
    """Where a command is shortened by dots or variables: that its flags are there."""
    for word in words:
        name = word.partition("=")[0]
        assert not name.startswith("--") or name in parser._option_string_actions, name


@of_each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text("utf-8"))):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = page if not path else (page.parent / path).resolve()
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("name", sorted({page.name for page in DOCS.glob("*.md")} - ONE_LANGUAGE))
def test_pages_are_in_both_languages_with_the_same_code(name):
    stem = name.removesuffix(".md").removesuffix(".ko")
    english, korean = DOCS / f"{stem}.md", DOCS / f"{stem}.ko.md"
    assert english.is_file() and korean.is_file()
    assert code_of(english) == code_of(korean)


@of_each_page
def test_commands_and_flags_exist(page):
    for words in commands(page):
        for program, arguments in programs(words):
            if program == "mixlm":
                parser = parser_of(build_parser(), arguments)
                is_whole = not any(word == "..." or word.startswith("$") for word in arguments)
                if is_whole and "--help" not in arguments:
                    build_parser().parse_args(arguments)
                else:
                    require_options(parser, arguments)
            elif program in SCRIPTS:
                parser = HfArgumentParser(SCRIPTS[program], allow_abbrev=False)
                require_options(parser, arguments)
                flags = [word for word in arguments if word != "..." and not word.startswith("$")]
                if flags and not flags[0].endswith(".json"):
                    parser.parse_args(flags)
            else:
                named = {block.splitlines()[0] for block in python_blocks(page)}
                assert (REPOSITORY / program).is_file() or f"# {program}" in named, program


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)


@of_each_page
def test_python_blocks_are_python(page):
    for block in python_blocks(page):
        ast.parse(block)


def test_the_formulas_are_where_the_page_says():
    rows = [line for line in (DOCS / "formulas.md").read_text("utf-8").splitlines() if re.match(r"\| .*\.py", line)]
    assert len(rows) > 30
    for row in rows:
        _, _, code, test, _ = row.split(" | ") if row.count(" | ") == 4 else ("", *row.strip("| ").split(" | "), "")
        for cell in (code, test):
            path = None
            for word in re.findall(r"`([^`]+)`", cell):
                if word.endswith(".py"):
                    path = REPOSITORY / word
                    assert path.is_file(), word
                else:
                    assert re.search(rf"(def|class) {word}\b", path.read_text("utf-8")), (row, word)


def test_the_kept_arguments_are_arguments():
    """The list of docs/moving.md of names that an older command line may go on using."""
    text = (DOCS / "moving.md").read_text("utf-8")
    kept = re.search(r"needs no change:\n\n(.*?)\n\n", text, flags=re.DOTALL)[1]
    names = re.findall(r"`(\w+)`", kept)
    assert len(names) > 15 and set(names) <= set(PretrainingArguments.__dataclass_fields__)


def test_the_index_lists_every_page():
    for language in ("", ".ko"):
        index = (DOCS / f"README{language}.md").read_text("utf-8")
        for english in DOCS.glob("*.md"):
            if english.name.endswith(".ko.md") or english.stem == "README":
                continue
            name = english.name if english.name in ONE_LANGUAGE else f"{english.stem}{language}.md"
            assert f"]({name})" in index, name


def test_the_api_page_is_that_of_the_code():
    specification = importlib.util.spec_from_file_location("api", DOCS / "api.py")
    api = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(api)
    assert (DOCS / "api.md").read_text("utf-8") == api.page(), "run python docs/api.py"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_first_steps_lead_to_answers(clone):  # noqa: F811
    """Every block of docs/first-steps.md as it is printed, and then what hardware.md runs on a laptop."""
    text = (DOCS / "first-steps.md").read_text("utf-8")
    for language, block in re.findall(r"```(console|python)\n(.*?)```", text, flags=re.DOTALL):
        if language == "console":
            # The page ends with Ctrl-C; tests/test_serving.py has it.
            run("\n".join(line for line in commands_of(block).splitlines() if "mixlm serve" not in line), clone)
        else:
            (clone / "block.py").write_text(block, "utf-8")
            run("python block.py", clone)
    assert (clone / "my-text.dat").read_text("utf-8").count("\n") == 5
    for words in commands(DOCS / "hardware.md"):
        if words[1] == "plan" or "two" in words:
            run(shlex.join(words), clone)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_programs_of_extending_work(tmp_path):
    for block in python_blocks(DOCS / "extending.md"):
        (tmp_path / block.splitlines()[0].removeprefix("# ")).write_text(block, "utf-8")
    printed = [run(shlex.join(words), tmp_path) for words in commands(DOCS / "extending.md")]
    one, two = (float(re.search(r"gradient norm ([\d.]+)", text)[1]) for text in printed[-2:])
    assert one == pytest.approx(two, rel=1e-3) and one != 0
