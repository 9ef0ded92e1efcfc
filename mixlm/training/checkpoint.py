"""Checkpoints: a folder is either whole or absent.

    step-00001000/
      model/                  plain `from_pretrained`, with the tokenizer, and reader.json or encoder.json
      optimizer.safetensors   the optimizer's moments by parameter name
      state.json              step, position in the data, resolved arguments, versions, hashes of the files

Written beside, flushed, hashed, renamed; older ones are deleted only afterwards. There is no random state to save:
order of data, masking and dropout are functions of the seed and the step. All tensors are whole and go by their names
in the model, so that a checkpoint goes on under another engine, precision or number of ranks.
"""

import copy
import errno
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.batching import Position
from ..errors import UserError, file_error
from ..files import names_of_remnants, require_inside, whole_folder, write_json
from ..loading import StoredSettings
from ..tokenization import save_tokenizer

OPTIMIZER_FILE, STATE_FILE, MODEL_FOLDER = "optimizer.safetensors", "state.json", "model"
SPARE_BYTES = 16 * 2**20  # for all that is not a tensor


class Evaluation(NamedTuple):
    """What the model after a step is worth: metrics by name."""

    step: int
    metrics: dict[str, float]


@dataclass
class TrainingState:
    """Where a run is: steps done, the place in the data after them, and the loss scale's state (fp16).

    With `evaluation_due` an evaluation was due after the last step, and the run was stopped before it. `best` is the
    best evaluation so far, where the run has a metric that says which is.
    """

    step: int
    position: Position
    scaler: dict[str, Any] | None = None
    evaluation_due: bool = False
    best: Evaluation | None = None


def skeleton_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model without numbers, to save checkpoints with: an engine may take the real one apart."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config)).to(model.dtype)


def save_checkpoint(
    folder: Path,
    skeleton: PreTrainedModel,
    parameters: dict[str, Tensor],
    moments: dict[str, Tensor],
    state: TrainingState,
    arguments: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: StoredSettings | None = None,
) -> None:
    """Write a whole checkpoint.

    Args:
        folder: where it is to be, e.g. `.../step-00001000`.
        skeleton: from `skeleton_of`.
        parameters: by name, whole, on the CPU.
        moments: the optimizer's state, by names as in `Engine.whole_moments`.
        state: steps done and place in the data.
        arguments: the resolved arguments of the run.
        tokenizer: of the model, if it has one.
        settings: to use the model with, if there are any.

    Raises:
        OSError: it cannot be written; what was there before still is. Nothing is begun where there is no room for it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in (*parameters.values(), *moments.values()))
    free = shutil.disk_usage(folder.parent).free
    if free < needed + SPARE_BYTES:
        shortage = f"{needed / 2**20:,.0f} MiB are needed and {free / 2**20:,.0f} MiB are free"
        raise OSError(errno.ENOSPC, shortage)
    with whole_folder(folder) as partial:
        # In one file, whatever its size.
        skeleton.save_pretrained(partial / MODEL_FOLDER, state_dict=parameters, max_shard_size=sys.maxsize)
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial / MODEL_FOLDER)
        if settings is not None:
            settings.save(partial / MODEL_FOLDER)
        save_file(moments, partial / OPTIMIZER_FILE)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        contents = {
            "step": state.step,
            "position": state.position.to_dict(),
            "scaler": state.scaler,
            "evaluation_due": state.evaluation_due,
            "best": None if state.best is None else state.best._asdict(),
            "arguments": arguments,
            "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
            "files": {path.relative_to(partial).as_posix(): _hash(path) for path in files},
        }
        contents["hash"] = _hash_of_state(contents)
        write_json(partial / STATE_FILE, contents)


def verify(folder: Path) -> None:
    """Raise UserError unless every file of the checkpoint is as it was written."""
    files = read_state(folder)["files"]
    require_inside(files, folder / STATE_FILE)
    try:
        for name, expected in files.items():
            if not (folder / name).is_file() or _hash(folder / name) != expected:
                raise UserError(f"{folder / name}: damaged or missing; use an older checkpoint")
    except OSError as error:
        raise UserError(f"{file_error(error)}; use an older checkpoint") from error


def load_checkpoint(
    folder: Path, model: nn.Module
) -> tuple[TrainingState, dict[str, Any], Callable[[str], Tensor | None]]:
    """Fill the model from a checkpoint that was verified.

    Returns:
        the state, the arguments the checkpoint was written with, and what reads the optimizer's state by names as in
        `Engine.whole_moments`: a tensor at a time, as far as it is wanted.

    Raises:
        UserError: not a checkpoint, or one of another model.
    """
    contents = read_state(folder)
    weights = load_file(folder / MODEL_FOLDER / "model.safetensors")
    _check_fit(folder, weights, model)
    model.load_state_dict(weights, strict=False)  # without the tied ones
    moments = safe_open(folder / OPTIMIZER_FILE, framework="pt")
    names = set(moments.keys())
    state = TrainingState(
        contents["step"],
        Position.from_dict(contents["position"]),
        contents["scaler"],
        contents["evaluation_due"],
        None if contents["best"] is None else Evaluation(**contents["best"]),
    )
    return state, contents["arguments"], lambda name: moments.get_tensor(name) if name in names else None


def _check_fit(folder: Path, weights: dict[str, Tensor], model: nn.Module) -> None:
    """Raise UserError unless `weights` are those of a model like `model`."""
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unexpected:
        raise UserError(f"{folder}: holds another model: missing {missing[:3]}, not expected {unexpected[:3]}")
    for name, tensor in own.items():
        if weights[name].shape != tensor.shape:
            raise UserError(
                f"{folder}: holds another model: {name} is {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
            )


def read_state(folder: Path) -> dict[str, Any]:
    """The contents of a checkpoint's state.json.

    Raises:
        UserError: there is none, or it is not readable.
    """
    try:
        contents = json.loads((folder / STATE_FILE).read_text("utf-8"))
        if contents.pop("hash") != _hash_of_state(contents):
            raise ValueError("not what was written")
        return contents
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: not a checkpoint (no {STATE_FILE}); they lie in RUN/checkpoints/step-..."
        ) from error
    except OSError as error:
        raise UserError(f"{file_error(error)}; use an older checkpoint") from error
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / STATE_FILE}: damaged ({type(error).__name__}: {error}); use an older checkpoint"
        ) from error


def checkpoints_in(folder: Path) -> list[Path]:
    """The whole checkpoints of a run's `checkpoints` folder, oldest first."""
    found = [
        path.parent for path in folder.glob(f"step-*/{STATE_FILE}") if re.fullmatch(r"step-\d+", path.parent.name)
    ]
    return sorted(found, key=step_of)


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where a run's checkpoint after `step` lies in its `checkpoints` folder."""
    return folder / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def prune(folder: Path, kept: list[Path]) -> None:
    """Delete all checkpoints but `kept`, and what was left of one by a process that was killed.

    Also those with a later step: they are of a run that was left by going back to an earlier checkpoint.
    """
    for path in checkpoints_in(folder):
        if path not in kept:
            (path / STATE_FILE).unlink()  # first: what is half deleted is no checkpoint
            shutil.rmtree(path)
    for path in folder.iterdir():
        if path not in kept and _is_remnant(path):
            shutil.rmtree(path)


def _is_remnant(path: Path) -> bool:
    """Whether a folder is of a checkpoint that was never finished, or whose deletion was not."""
    if re.fullmatch(r"step-\d+", path.name):
        return not (path / STATE_FILE).is_file()
    step = re.match(r"\.(step-\d+)\.", path.name)
    return step is not None and path.name in names_of_remnants(step[1])


def _hash_of_state(contents: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).hexdigest()
