"""What a run was made with, kept beside its model in run.json: commands, arguments, data by hash, versions.

It holds nothing of the environment, and so no token.
"""

import json
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..data.corpus import dataset_fingerprint, load_splits
from ..data.hashing import content_hashes, file_stamps, hash_file
from ..data.languages import languages_of, samples_of
from ..errors import UserError, one_line
from ..files import cache_folder, json_text, write_whole
from .arguments import TrainingArguments

RECORD_FILE, RESULTS_FILE = "run.json", "eval_results.json"
LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "datasets",
    "safetensors",
    "huggingface_hub",
    "numpy",
)
SAMPLED_ROWS = 200  # of a dataset, to tell its languages


def record_run(arguments: TrainingArguments, resolved: dict[str, Any], first_step: int) -> None:
    """Write run.json into the run's folder, before the first step of this process.

    Args:
        arguments: of the run.
        resolved: the same by name, as they are now, with what follows from them.
        first_step: steps that were done before, by earlier commands; those that came to nothing are left out.

    Raises:
        UserError: the data cannot be read, or an earlier run.json is damaged.
        OSError: it cannot be written.
    """
    folder = arguments.run_folder
    earlier = (read_record(folder) or {}).get("commands", [])
    # "python", and not where it lies on this machine; what a launcher was told is not known here.
    command = {"command": shlex.join(["python", *sys.argv]), "first_step": first_step}
    data, languages = _describe_data(arguments)
    record = {
        "script": Path(sys.argv[0]).name,
        "commands": [*(each for each in earlier if each["first_step"] < first_step), command],
        "arguments": resolved,
        "base_model": _base_model(getattr(arguments, "model_name_or_path", None)),
        "languages": languages,
        "data": data,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "versions": {
            "mixlm": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in LIBRARIES},
        },
    }
    write_record(folder, record)


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `record_run` has written, if there is anything.

    Raises:
        UserError: it is something else.
    """
    file = folder / RECORD_FILE
    try:
        record = json.loads(file.read_text("utf-8"))
        _require_entries(record)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, TypeError) as error:
        raise UserError(f"{file}: is not what a training writes: {one_line(error)}; delete it") from error
    return record


def _require_entries(record: Any) -> None:
    """Raise ValueError unless a record has what is read of it, in the kinds that it is written in."""

    def require(values: Any, **kinds: type) -> None:
        for name, kind in kinds.items():
            if not isinstance(values, dict) or not isinstance(values.get(name), kind):
                raise ValueError(f"{name} is missing, or no {kind.__name__}")

    require(record, commands=list, arguments=dict, data=list, languages=list, versions=dict, device=str)
    require({"processes": 1, **record["arguments"]}, processes=int)
    if not all(isinstance(language, str) for language in record["languages"]):
        raise ValueError("a language is no text")
    for command in record["commands"]:
        require(command, command=str, first_step=int)
    for entry in record["data"]:
        require(entry, argument=str, name=str)
        if "fingerprints" in entry:
            require(entry, fingerprints=dict)
            continue
        require(entry, files=list)
        for file in entry["files"]:
            require(file, name=str, bytes=int, blake2b=str)
    base_model = record.get("base_model")
    if base_model is not None:
        require(base_model, name=str)
        if not isinstance(base_model.get("hub_model_id"), str | None):
            raise ValueError("hub_model_id is no text")


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write run.json; OSError where that cannot be done."""
    write_whole(folder / RECORD_FILE, json_text(record))


def _describe_data(arguments: TrainingArguments) -> tuple[list[dict[str, Any]], list[str]]:
    """What the run reads, with hashes, and the languages of that."""
    described, samples = [], []
    for argument, source in arguments.data_sources().items():
        given = getattr(arguments, argument)
        entry = {"argument": argument, "name": _name_of(given)}
        if isinstance(source, list):
            entry["files"] = _describe_files(source, _hashes(arguments, argument, source))
            samples += samples_of(source)
        else:
            if not Path(given).exists():
                entry["name"] = given  # on the Hub, with its owner
            splits = load_splits(source, arguments.dataset_config_name, getattr(arguments, "streaming", False))
            entry["fingerprints"] = {name: dataset_fingerprint(split) for name, split in splits.items()}
            rows = (row for split in splits.values() for row in split.take(SAMPLED_ROWS))
            samples += [value for row in rows for value in row.values() if isinstance(value, str)]
        described.append(entry)
    return described, languages_of(samples)


def _name_of(given: str | list[str]) -> str:
    """What a person calls the data: the last part of its path or paths."""
    return ", ".join(Path(each).name or each for each in ([given] if isinstance(given, str) else given))


def _hashes(arguments: TrainingArguments, argument: str, files: list[Path]) -> list[str]:
    if argument in ("corpus_path", "dataset_name"):  # they may be large; hashes that are known are remembered
        return content_hashes(file_stamps(files), cache_folder(getattr(arguments, "cache_dir", None)))
    return [hash_file(file) for file in files]


def _describe_files(files: list[Path], hashes: list[str]) -> list[dict[str, Any]]:
    """Name, size and hash of each; `b2sum --length 128 FILE` prints the same hash."""
    files = [file.absolute() for file in files]
    common = os.path.commonpath([file.parent for file in files])
    return [
        {
            "name": Path(os.path.relpath(file, common)).as_posix(),
            "bytes": file.stat().st_size,
            "blake2b": digest,
        }
        for file, digest in zip(files, hashes, strict=True)
    ]


def _base_model(name: str | None) -> dict[str, str | None] | None:
    """The model that is trained on, and what it is called on the Hub, if it is there."""
    if name is None:
        return None
    folder = Path(name)
    if folder.is_dir():
        return {"name": folder.resolve().name, "hub_model_id": (read_record(folder) or {}).get("hub_model_id")}
    return {"name": name, "hub_model_id": name}
