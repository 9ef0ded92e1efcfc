"""Who may import whom (the arrows of the design), read from the source without importing it."""

import ast
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "mixlm"
MODULES = sorted(PACKAGE.rglob("*.py"))
MODEL_CODE = ("configuration", "heads", "kernels", "modeling_mixlm", "modeling_switch")
# Layers, top to bottom; a module imports from its own layer and from lower ones.
LAYERS = [
    {"cli"},
    {"profiling", "planning", "probing", "open_qa", "serving", "exporting"},
    {"training", "retrieval"},
    {"evaluation", "reader", "encoder"},
    {"data", "tokenization", "conversion", "loading", "hub"},
    {"files", "progress", "live_memory"},
]
ONLY_IN = {"fairscale": ("training", "sharding"), "faiss": ("retrieval", "index")}


def module_name(path: Path) -> str:
    """mixlm/data/corpus.py -> data.corpus; mixlm/data/__init__.py -> data; mixlm/__init__.py -> ""."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, path: Path) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of everything that is imported, also inside functions and under TYPE_CHECKING."""
    package = ["mixlm", *path.relative_to(PACKAGE).parent.parts]
    found = []
    for node in ast.walk(ast.parse(source, str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.append((node.lineno, str(node.args[0].value)))
    return found


def imports_of(path: Path) -> list[tuple[int, str]]:
    return imports(path.read_text("utf-8"), path)


def part_of(name: str) -> str | None:
    """mixlm.data.corpus.read -> data: the part of mixlm that an absolute name belongs to; None for other packages."""
    parts = name.split(".")
    if parts[0] != "mixlm" or len(parts) == 1:
        return None
    return parts[1]


def rank(part: str) -> int | None:
    """The layer of a part; None for what has none: model code, errors and the package itself may be used by all."""
    return next((number for number, layer in enumerate(LAYERS) if part in layer), None)


EACH_MODULE = pytest.mark.parametrize("path", MODULES, ids=lambda path: module_name(path) or "mixlm")


def test_the_reader_reads():
    """The checks below would be empty if imports were not found."""
    source = (
        "import os, faiss.x as f\n"
        "from .corpus import read\n"
        "from ..training.loop import train\n"
        "from .. import cli\n"
        "def late():\n"
        "    from mixlm.retrieval import index\n"
        "    importlib.import_module('fairscale')\n"
    )
    found = {name for _, name in imports(source, PACKAGE / "data" / "blocks.py")}
    assert found == {
        "os",
        "faiss.x",
        "mixlm.data.corpus.read",
        "mixlm.training.loop.train",
        "mixlm.cli",
        "mixlm.retrieval.index",
        "fairscale",
    }
    assert [part_of(name) for name in ("mixlm.data.corpus.read", "mixlm", "os.path")] == ["data", None, None]


def test_the_model_code_is_there():
    assert {*MODEL_CODE, "errors", "conversion", ""} <= {module_name(path) for path in MODULES}


@pytest.mark.parametrize("name", MODEL_CODE)
class TestModelCode:
    """What the Hub receives: flat siblings, no package that may be missing where it is loaded."""

    ALLOWED = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}

    def test_imports(self, name):
        path = PACKAGE / f"{name}.py"
        for line, imported in imports_of(path):
            part = part_of(imported)
            if part is None:
                assert imported.split(".")[0] in self.ALLOWED, f"{path}:{line} imports {imported}"
            else:
                assert part in MODEL_CODE, f"{path}:{line} imports {imported}, which is not model code"

    def test_siblings_are_imported_flat(self, name):
        """`from .sibling import Name` is all that the remote-code loader understands."""
        path = PACKAGE / f"{name}.py"
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
                assert "mixlm" not in names, f"{path}:{node.lineno} imports its own package by name"
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module, f"{path}:{node.lineno}"
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] != "mixlm", f"{path}:{node.lineno} imports its own package by name"


@EACH_MODULE
def test_nothing_points_back_up(path):
    """cli -> training, retrieval, evaluation -> data -> model code."""
    own = module_name(path).split(".")[0]
    for line, imported in imports_of(path):
        part = part_of(imported)
        if own == "" or part is None or part == own:
            continue
        if own in (*MODEL_CODE, "errors"):
            assert rank(part) is None, f"{path}:{line} imports {imported}"
        elif rank(part) is not None and rank(own) is not None:
            assert rank(part) >= rank(own), f"{path}:{line}: {own} imports {imported}, which is above it"


def test_every_part_has_its_layer():
    """A new part of the package must be given its place above."""
    parts = {module_name(path).split(".")[0] for path in MODULES} - {""}
    unknown = {part for part in parts if rank(part) is None} - {*MODEL_CODE, "errors"}
    assert not unknown, f"say in LAYERS where {unknown} stands"


def test_the_package_itself_imports_model_code_alone():
    """`import mixlm` must not pull in training, retrieval or the data pipeline."""
    path = PACKAGE / "__init__.py"
    for line, imported in imports_of(path):
        assert part_of(imported) in (None, *MODEL_CODE), f"{path}:{line} imports {imported}"


@EACH_MODULE
def test_rare_packages_are_imported_in_one_place(path):
    for line, imported in imports_of(path):
        folder, prefix = ONLY_IN.get(imported.split(".")[0], (None, None))
        if folder is not None:
            parts = module_name(path).split(".")
            assert len(parts) > 1 and parts[0] == folder and parts[1].startswith(prefix), (
                f"{path}:{line} imports {imported}, which belongs in {folder}/{prefix}*"
            )


@EACH_MODULE
def test_no_utils(path):
    assert "utils" not in module_name(path).replace("_", ".").split("."), "say what is in it"


@EACH_MODULE
def test_tests_and_scripts_are_not_imported(path):
    scripts = {script.stem for script in REPOSITORY.glob("*.py")} | {"tests", "conftest"}
    for line, imported in imports_of(path):
        assert imported.split(".")[0] not in scripts, f"{path}:{line} imports {imported}"
