#!/usr/bin/env python
"""Write docs/api.md out of the docstrings: `python docs/api.py`. A test holds the page to the code."""

import ast
import dataclasses
import inspect
from importlib import import_module
from pathlib import Path
from textwrap import dedent, wrap
from typing import Any

PAGE = Path(__file__).parent / "api.md"
# Of each part its title, and the module and names it has; no names = all that the module declares public.
PARTS = (
    ("Models and configurations", "mixlm", None),
    ("Machine reading", "mixlm.reader", ("MixLMReader", "ReadAnswer", "Decoding")),
    ("Texts to vectors", "mixlm.encoder", ("MixLMEncoder", "Encoding")),
    ("Indexes", "mixlm.retrieval.index", ("Index", "build_index", "open_index")),
    ("Search", "mixlm.retrieval.search", ("Search",)),
    ("Answers from an index", "mixlm.open_qa", ("OpenQA", "OpenAnswer", "Candidate", "Choice")),
)
# The arguments of the scripts: those that all have, and what each class adds.
ARGUMENTS = (
    ("All scripts", "mixlm.training.arguments", "TrainingArguments"),
    ("`run_pretraining.py`", "mixlm.training.arguments", "PretrainingArguments"),
    ("`run_mrc.py` and `run_ict.py`", "mixlm.training.fine_tuning", "FineTuningArguments"),
    ("`run_mrc.py`", "mixlm.training.reading", "ReadingArguments"),
    ("`run_ict.py`", "mixlm.training.retrieval", "RetrievalArguments"),
)
HEAD = """# API

Written by `python docs/api.py` out of the docstrings; a test holds this page to the code. The command line is
described by `mixlm VERB --help`.
"""


def signature(function: Any, name: str) -> list[str]:
    """A block with the parameters of a function as its source has them."""
    (definition,) = ast.parse(dedent(inspect.getsource(inspect.unwrap(function)))).body
    arguments = definition.args
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        arguments.args.pop(0)
    returns = f" -> {ast.unparse(definition.returns)}" if definition.returns else ""
    line = f"{name}({ast.unparse(arguments)}){returns}"
    return ["```text", *wrap(line, 115, subsequent_indent="    ", break_on_hyphens=False), "```", ""]


def described(member: Any) -> str:
    """The docstring, as a block that keeps its lines."""
    text = inspect.getdoc(member) or ""
    first, _, rest = text.partition("\n")
    return first if not rest.strip() else f"{first}\n\n```text\n{rest.strip()}\n```"


def public_methods(owner: type) -> list[tuple[str, Any]]:
    """The methods and properties that a class of this package itself defines, in the order of its source."""
    return [(name, member) for name, member in vars(owner).items() if not name.startswith("_") and is_shown(member)]


def is_shown(member: Any) -> bool:
    function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    return inspect.isfunction(function) and bool(function.__doc__)


def entry(name: str, member: Any) -> list[str]:
    """The lines of a class, or of a function."""
    lines = [f"### {name}", "", f"`{member.__module__}`", ""]
    if inspect.isfunction(member):
        return [*lines, *signature(member, name), described(member), ""]
    lines += [described(member), ""]
    if dataclasses.is_dataclass(member) or issubclass(member, tuple):  # the docstring has their fields
        return lines
    forward = getattr(member, "forward", None)
    if forward is not None and forward.__module__.startswith("mixlm."):
        methods = [("forward", forward)]
    else:
        methods = public_methods(member)
        if "__init__" in vars(member):
            lines += signature(member.__init__, name)
    for method, value in methods:
        if isinstance(value, property):
            lines += [f"#### {name}.{method}", "", described(value), ""]
        else:
            function = getattr(value, "__func__", value)
            lines += [f"#### {name}.{method}()", "", *signature(function, method), described(function), ""]
    return lines


def argument_table(arguments: type) -> list[str]:
    """What a class of arguments adds to those above it, or has another default of."""
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(arguments):
        if field.name not in vars(arguments)["__annotations__"]:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        shown = "required" if default is dataclasses.MISSING else "" if default is None else f"`{default}`"
        meaning = " ".join(field.metadata.get("help", "").split()).replace("|", "\\|")
        lines.append(f"| `--{field.name}` | {shown} | {meaning} |")
    return [*lines, ""]


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for title, module_name, names in PARTS:
        module = import_module(module_name)
        lines += [f"## {title}", ""]
        for name in names or module.__all__:
            lines += entry(name, getattr(module, name))
    lines += ["## Arguments of the scripts", ""]
    for title, module_name, name in ARGUMENTS:
        lines += [f"### {title}", "", *argument_table(getattr(import_module(module_name), name))]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
