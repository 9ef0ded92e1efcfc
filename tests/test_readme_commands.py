"""A newcomer goes through README.md from top to bottom: every command works as it is printed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
DATA = Path(os.environ.get("MIXLM_DATA", REPOSITORY.parent / "shared" / "data"))
# What is not run here, and why: a block of commands is known by what it begins with.
NOT_RUN = {
    "$ make": "demo has a test of its own below, and test is this one",
    "$ python3 -m venv": "the package is installed where tests run",
    "$ python benchmarks/learning/study.py": "takes hours",
}


def blocks(page: str = "README.md") -> list[str]:
    """The console blocks of a page."""
    return re.findall(r"```console\n(.*?)```", (REPOSITORY / page).read_text("utf-8"), flags=re.DOTALL)


def commands_of(block: str) -> str:
    """What a person types, for a shell that ends with the first failure."""
    lines = [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]
    return "set -e\n" + "\n".join(lines)


def is_run(block: str) -> bool:
    return not any(block.startswith(beginning) for beginning in NOT_RUN)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The repository as it is here, beside the data that the README finds there, with `mixlm` and `python` on PATH."""
    folder = tmp_path_factory.mktemp("newcomer")
    names = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        if (REPOSITORY / name).is_file():
            (folder / "mixlm" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / "mixlm" / name)
    if DATA.is_dir():
        (folder / "shared").mkdir()
        (folder / "shared" / "data").symlink_to(DATA.resolve())
    return folder / "mixlm"


def run(command: str, folder: Path) -> str:
    """What the shell prints."""
    programs = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "MIXLM_CACHE": str(folder / "cache")}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_what_is_not_run_is_in_the_readme():
    for beginning in NOT_RUN:
        assert any(block.startswith(beginning) for block in blocks()), beginning
    assert sum(map(is_run, blocks())) >= 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_commands_work_from_top_to_bottom(clone):
    """`make demo`, whose models the others go on with, and then all of them."""
    installed = Path(sys.prefix) / "installed"
    printed = run(f"make demo VENV={sys.prefix} --old-file={installed}", clone)  # as it is: nothing is to be installed
    assert printed.count("retriever ") >= 9 and "mixlm serve --index demo-output/index" in printed
    for name in ("tiny", "reader", "retriever"):
        assert (clone / "demo-output" / name / "curves.png").stat().st_size > 10_000
    for block in filter(is_run, blocks()):
        if "../shared/data" in block and not DATA.is_dir():
            continue
        run(commands_of(block), clone)
    for block in blocks("docs/export.md"):  # of the models that the README has made
        run(commands_of(block), clone)
