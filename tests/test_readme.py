"""What the READMEs say is true, and the two say the same."""

import ast
import json
import re
from pathlib import Path

import pytest

from mixlm import MixLMConfig, MixLMForPreTraining, MixLMSwitchConfig, MixLMSwitchForPreTraining, preset_names
from mixlm.configuration import PRESET_FOLDER
from mixlm.training.arguments import PretrainingArguments, parse_arguments

REPOSITORY = Path(__file__).parent.parent
ENGLISH, KOREAN = ((REPOSITORY / name).read_text("utf-8") for name in ("README.md", "README.ko.md"))


def code_blocks(text: str) -> list[str]:
    """The fenced blocks without comments."""
    blocks = re.findall(r"```\w+\n(.*?)```", text, flags=re.DOTALL)
    return [re.sub(r"\s*# .*", "", block) for block in blocks]


def table_cells(text: str) -> list[list[str]]:
    """What stands between backquotes in each row of each table, and every number, sorted: word order differs."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [sorted(re.findall(r"`([^`]+)`|(\d[\d.,]*)", row)) for row in rows]


def test_both_open_with_the_two_commands():
    for text in (ENGLISH, KOREAN):
        first = code_blocks(text)[0]
        assert first.split() == ["$", "make", "demo", "$", "make", "test"]


def test_both_languages_show_the_same_commands_and_tables():
    assert code_blocks(ENGLISH) == code_blocks(KOREAN)
    assert table_cells(ENGLISH) == table_cells(KOREAN)


def test_what_is_installed_is_enough_for_the_commands():
    """Of the extras, `retrieval` is what an index needs, and `plot` what a report draws with."""
    (extras,) = re.findall(r"^\$ pip install --constraint constraints.txt '\.\[(.*)\]'$", ENGLISH, flags=re.MULTILINE)
    needs = {"index": "retrieval", "encode": "retrieval", "search": "retrieval", "ask": "retrieval", "report": "plot"}
    needs |= {"mine": "retrieval", "tune": "retrieval", "serve": "demo", "export": "export"}
    used = set(re.findall(r"^\$ mixlm (\w+)", ENGLISH, flags=re.MULTILINE))
    assert {"index", "search", "report"} <= used
    assert {needs[verb] for verb in used if verb in needs} <= set(extras.split(","))


def test_python_blocks_are_python():
    for block in re.findall(r"```python\n(.*?)```", ENGLISH, flags=re.DOTALL):
        ast.parse(block)


@pytest.mark.parametrize("name", preset_names())
def test_the_preset_table_is_true(name):
    fields = json.loads((PRESET_FOLDER / f"{name}.json").read_text("utf-8"))
    if fields["model_type"] == "mixlm":
        model = MixLMForPreTraining(MixLMConfig.from_preset(name))
    else:
        model = MixLMSwitchForPreTraining(MixLMSwitchConfig.from_preset(name))
    (row,) = [line for line in ENGLISH.splitlines() if line.startswith(f"| `{name}` |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == str(fields["num_hidden_layers"])
    assert cells[2] == str(fields["hidden_size"])
    assert cells[3].split()[-1] == str(fields["ff_dim"])
    assert cells[5].split()[0] == str(fields["layer_group"])
    assert cells[6] == f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}M"


def test_every_documented_flag_exists_with_its_default():
    defaults = parse_arguments(PretrainingArguments, ["--model_name", "x", "--corpus_path", "x", "--tokenizer", "x"])
    defaults.fit_learning_rate(MixLMConfig.from_preset(defaults.preset).hidden_size)
    for row in re.findall(r"^\| (`--.*)$", ENGLISH, flags=re.MULTILINE):
        flags_cell, default_cell, _ = (cell.strip() for cell in row.split("|", 2))
        flags = re.findall(r"`--(\w+)[^`]*`", flags_cell)
        assert flags and all(hasattr(defaults, flag) for flag in flags), row
        values = [value.strip(" `") for value in default_cell.split(",")]
        for flag, value in zip(flags, values, strict=False):
            if value and not value.startswith("-"):
                assert str(getattr(defaults, flag)) == str(type(getattr(defaults, flag))(value)), (flag, value)


def test_the_demo_is_what_the_makefile_runs():
    recipe = (REPOSITORY / "Makefile").read_text("utf-8")
    arguments = parse_arguments(PretrainingArguments, [str(REPOSITORY / "examples" / "demo.json")])
    assert "run_pretraining.py examples/demo.json" in recipe
    assert str(arguments.run_folder) == "demo-output/tiny" and "$(DEMO)/tiny" in recipe
