"""Transformers' own common model tests, for a model that lives outside its repository.

They are not installed with transformers but are part of its source archive on PyPI. The archive of the installed
version is fetched with pip once and kept in a cache folder outside the repository: MIXLM_CACHE, or ~/.cache/mixlm.
"""

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import transformers
from filelock import FileLock

PACKAGE = "transformers_common_tests"
FILES = ("test_modeling_common.py", "test_configuration_common.py")
PIP_SECONDS = 240

# What `ConfigTester` sets and expects to read back. Upstream keeps it in a sub-package that the archive lacks.
CONFIG_COMMON_KWARGS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}


class Unavailable(Exception):
    """The source archive cannot be had; the message is one line that says why."""


def suite_folder() -> Path:
    """The folder with the common tests of the installed transformers; fetches it the first time.

    Safe to call from several processes: one of them fetches, and the folder is either whole or absent.

    Raises:
        Unavailable: pip cannot fetch the archive.
        OSError: the cache folder cannot be written.
    """
    cache = Path(os.environ.get("MIXLM_CACHE") or Path.home() / ".cache" / "mixlm")
    folder = cache / f"transformers-{transformers.__version__}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                staged = Path(scratch) / "staged"
                staged.mkdir()
                _extract(_download(Path(scratch)), staged)
                staged.rename(folder)
    return folder


def load_suite() -> tuple[ModuleType, ModuleType]:
    """The modules `test_modeling_common` and `test_configuration_common`.

    Raises:
        Unavailable: as `suite_folder`.
    """
    folder = suite_folder()
    _add_module(PACKAGE).__path__ = [str(folder)]
    # Sub-packages of upstream's tests that the archive lacks; generation does not concern an encoder.
    _add_module(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    _add_module(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    _add_module(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs=CONFIG_COMMON_KWARGS)
    modeling, configuration = (importlib.import_module(f"{PACKAGE}.{Path(file).stem}") for file in FILES)
    return modeling, configuration


def _download(scratch: Path) -> Path:
    requirement = f"transformers=={transformers.__version__}"
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1",
        "--no-binary", ":all:", "--no-deps", "--no-build-isolation", "--dest", str(scratch), requirement,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"pip did not fetch the source of {requirement} within {PIP_SECONDS} s") from error
    archives = list(scratch.glob("transformers-*.tar.gz"))
    if done.returncode or not archives:
        reason = (done.stderr.strip().splitlines() or ["no archive"])[-1]
        raise Unavailable(f"pip cannot fetch the source of {requirement}: {reason}")
    return archives[0]


def _extract(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if member.isfile() and parts[1:-1] == ("tests",) and parts[-1] in FILES:
                with open(folder / parts[-1], "wb") as target:
                    shutil.copyfileobj(tar.extractfile(member), target)
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise Unavailable(f"the source of transformers {transformers.__version__} has no tests/{missing[0]}")
    # `test_configuration_common` executes the __init__.py beside itself, in the name of transformers.
    (folder / "__init__.py").touch()


def _add_module(name: str, **attributes) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module
    return module
