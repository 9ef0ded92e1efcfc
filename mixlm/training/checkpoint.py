"""Checkpoints: a folder is either whole or absent.

    step-00001000/
      model/                  plain `from_pretrained`
      optimizer.safetensors   AdamW's moments by parameter name
      state.json              step, position in the data, resolved arguments, versions, hashes of the files

Written beside, flushed, hashed, renamed; older ones are deleted only afterwards. There is no random state to save:
order of data, masking and dropout are functions of the seed and the step.
"""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..data.batching import Position
from ..errors import UserError
from ..files import whole_folder

OPTIMIZER_FILE, STATE_FILE, MODEL_FOLDER = "optimizer.safetensors", "state.json", "model"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainingState:
    """Where a run is: steps done, the place in the data after them, and the gradient scaler's state (fp16)."""

    step: int
    position: Position
    scaler: dict[str, Any] | None = None


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState, arguments: dict[str, Any]
) -> None:
    """Write a whole checkpoint.

    Args:
        folder: where it is to be, e.g. `.../step-00001000`.
        model: the bare PreTrainedModel.
        optimizer: AdamW over its parameters.
        state: steps done and place in the data.
        arguments: the resolved arguments of the run.
    """

    with whole_folder(folder) as partial:
        model.save_pretrained(partial / MODEL_FOLDER)
        save_file(optimizer_tensors(model, optimizer), partial / OPTIMIZER_FILE)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        contents = {
            "step": state.step,
            "position": state.position.to_dict(),
            "scaler": state.scaler,
            "arguments": arguments,
            "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
            "files": {path.relative_to(partial).as_posix(): _hash(path) for path in files},
        }
        (partial / STATE_FILE).write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", "utf-8")


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[TrainingState, dict[str, Any]]:
    """Fill model and optimizer; returns the state and the arguments the checkpoint was written with.

    Raises:
        UserError: not a checkpoint, a damaged file, or one of another model.
    """
    contents = read_state(folder)
    for name, expected in contents["files"].items():
        if not (folder / name).is_file() or _hash(folder / name) != expected:
            raise UserError(f"{folder / name}: damaged or missing; use an older checkpoint")
    weights = load_file(folder / MODEL_FOLDER / "model.safetensors")
    _check_fit(folder, weights, model)
    model.load_state_dict(weights, strict=False)  # without the tied ones
    load_optimizer_tensors(model, optimizer, load_file(folder / OPTIMIZER_FILE))
    state = TrainingState(contents["step"], Position.from_dict(contents["position"]), contents["scaler"])
    return state, contents["arguments"]


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
        Position.from_dict(contents["position"])
        types = {"files": dict, "step": int, "arguments": dict, "scaler": (dict, type(None))}
        for name, expected in types.items():
            if not isinstance(contents[name], expected):
                raise ValueError(f"{name} is of another type")
        return contents
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: not a checkpoint (no {STATE_FILE}); they lie in RUN/checkpoints/step-..."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / STATE_FILE}: damaged ({type(error).__name__}: {error}); use an older one"
        ) from error


def checkpoints_in(folder: Path) -> list[Path]:
    """The whole checkpoints of a run's `checkpoints` folder, oldest first."""
    found = [
        path.parent for path in folder.glob(f"step-*/{STATE_FILE}") if re.fullmatch(r"step-\d+", path.parent.name)
    ]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def prune(folder: Path, kept: list[Path]) -> None:
    """Delete all checkpoints but `kept`.

    Also those with a later step: they are of a run that was left by going back to an earlier checkpoint.
    """
    for path in checkpoints_in(folder):
        if path not in kept:
            (path / STATE_FILE).unlink()  # first: what is half deleted is no checkpoint
            shutil.rmtree(path)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as `moment/parameter name` -> tensor, and `step/parameter name`."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key in (*MOMENTS, "step"):
            if parameter in optimizer.state:
                tensors[f"{key}/{name}"] = optimizer.state[parameter][key].detach().cpu()
    return tensors


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The reverse of `optimizer_tensors`."""
    for name, parameter in model.named_parameters():
        if f"step/{name}" in tensors:
            keys = (*MOMENTS, "step")
            optimizer.state[parameter] = {key: tensors[f"{key}/{name}"].to(parameter.device) for key in keys}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).hexdigest()
