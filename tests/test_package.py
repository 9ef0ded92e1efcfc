"""Wheel and source archive: what is in them, and that they work where nothing else is."""

import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

import mixlm

REPOSITORY = Path(__file__).parent.parent
SMOKE = """
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForMaskedLM

import mixlm

package = Path(mixlm.__file__).parent
assert package.is_relative_to(sys.prefix), package
assert version("mixlm") == mixlm.__version__ and (package / "py.typed").is_file()
config = mixlm.MixLMConfig.from_preset("mixlm-tiny")
mixlm.MixLMForMaskedLM(config).save_pretrained("model")
model = AutoModelForMaskedLM.from_pretrained("model")
assert model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.shape == (1, 4, config.vocab_size)
print(package / "sample")
"""


def run(*command, **options) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_version_is_in_one_place():
    pattern = re.compile(rf"(?<![\d.]){re.escape(mixlm.__version__)}(?![\d.])")
    files = [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("*.toml"), *(REPOSITORY / "mixlm").rglob("*.py")]
    found = [file.relative_to(REPOSITORY).as_posix() for file in files if pattern.search(file.read_text("utf-8"))]
    assert found == ["mixlm/__init__.py"]


def test_what_is_tested_as_the_oldest_is_what_is_allowed():
    def pinned(file: str) -> dict[str, str]:
        lines = (REPOSITORY / file).read_text("utf-8").splitlines()
        return dict(line.split("==") for line in lines if not line.startswith("#"))

    required = (REPOSITORY / "setup.py").read_text("utf-8").partition('"export"')[0]  # that extra has newer needs
    allowed = dict(re.findall(r'"([\w-]+)>=([\d.]+)', required)) | {"matplotlib": "3.10"}
    oldest = pinned("constraints-min.txt")
    assert allowed.keys() == oldest.keys()
    for name, version in oldest.items():
        assert Version(version) == Version(allowed[name]), name
        assert Version(version) <= Version(pinned("constraints.txt")[name]), name


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> list[Path]:
    """Wheel and source archive of this repository."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, REPOSITORY)
    return [*out.glob("*.whl"), *out.glob("*.tar.gz")]


@pytest.mark.slow
def test_both_have_every_file_of_the_package(archives):
    wanted = {
        path.relative_to(REPOSITORY).as_posix()
        for pattern in ("*.py", "*.json", "*.dat", "py.typed")
        for path in (REPOSITORY / "mixlm").rglob(pattern)
    }
    wheel, source = archives
    assert {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("mixlm/")} == wanted
    names = {name.partition("/")[2] for name in tarfile.open(source).getnames()}
    scripts = {"run_pretraining.py", "run_mrc.py", "run_ict.py", "examples/demo.json", "constraints.txt", "LICENSE"}
    assert wanted | scripts <= names and not any(name.startswith("tests") for name in names)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # it installs everything, twice
def test_both_work_in_an_empty_environment(archives, tmp_path):
    for number, archive in enumerate(archives):
        folder = tmp_path / f"{number}"
        venv.create(folder / "venv", with_pip=True)
        binaries = folder / "venv" / "bin"
        constraints = REPOSITORY / "constraints.txt"
        torch = next(line for line in constraints.read_text().splitlines() if line.startswith("torch=="))
        run(binaries / "pip", "install", "--quiet", torch)
        run(binaries / "pip", "install", "--quiet", "--constraint", constraints, archive)
        sample = run(binaries / "python", "-c", SMOKE, cwd=folder).strip()
        trained = ["--corpus_path", sample, "--vocab_size", "1000", "--out", "tokenizer"]
        run(binaries / "mixlm", "tokenizer", "train", *trained, cwd=folder)
        assert (folder / "tokenizer" / "tokenizer.json").is_file()
        assert "serve" in run(binaries / "mixlm", "--help", cwd=folder)
