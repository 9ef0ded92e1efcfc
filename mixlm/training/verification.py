"""Whether every sharding engine trains on this machine as one process does: `mixlm verify-engines`.

Each engine trains a small model for a few steps on several processes, with the loop, the checkpoints and the arguments
of a real run, and again to see whether it repeats itself. A single process is what it is compared with. Every engine
has processes of its own, so that one that crashes or hangs says nothing of the others.
"""

import dataclasses
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..configuration import MixLMConfig, MixLMSwitchConfig
from ..data.batching import Position, collate
from ..errors import UserError, exits_on_user_error
from ..heads import IGNORE
from ..modeling_mixlm import MixLMForPreTraining
from ..modeling_switch import MixLMSwitchForPreTraining
from .arguments import TrainingArguments, has_matrices
from .checkpoint import MODEL_FOLDER, OPTIMIZER_FILE, checkpoints_in
from .launch import run_ranks
from .loop import train
from .memory import MemoryMeter
from .objectives import Batch, SentenceOrderObjective
from .report import read_curves
from .run import CHECKPOINTS, prepare_run
from .sharding import number_of_ranks, this_rank

STEPS, ROWS, LONGEST, VOCABULARY, MICRO_BATCHES = 6, 16, 24, 20_000, 2
FAMILIES = {
    "mixlm": (MixLMConfig, MixLMForPreTraining, {"kernel_size": 5, "n_experts": 2, "num_heads": 2}),
    "switch": (MixLMSwitchConfig, MixLMSwitchForPreTraining, {"n_experts": 4, "num_heads": 4}),
}
# Layers share parameters and embeddings are tied, which is where sharding goes wrong. The vocabulary is what makes
# memory show: it costs little time, for few tokens are scored.
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "ff_dim": 512,
    "layer_group": 3,
    "shared_parameters": "ffn",
    "max_position_embeddings": LONGEST,
    "dropout_prob": 0.0,
}
TIMEOUT_SECONDS = 600


class Case(NamedTuple):
    """An engine as the arguments of a run ask for it."""

    zero: int
    sharding_backend: str
    auto_wrap: bool
    muon: bool = False

    @property
    def name(self) -> str:
        """As in the table: `zero 3 torch auto_wrap`."""
        backend = f" {self.sharding_backend}" if self.zero else ""
        return f"zero {self.zero}{backend}{' auto_wrap' if self.auto_wrap else ''}"


CASES = [
    Case(0, "torch", auto_wrap=False),
    *(
        Case(zero, backend, auto_wrap)
        for backend in ("torch", "fairscale")
        for zero in (1, 2, 3)
        for auto_wrap in (False, True)
        if zero > 1 or not auto_wrap
    ),
]


class Tolerance(NamedTuple):
    """The largest difference from one process that is no mistake: relative, but for parameters, which are compared
    with the largest change of any. Sums over ranks are made in another order; in 16 bits that is seen sooner."""

    loss: float
    gradient_norm: float
    parameters: float
    moments: float


TOLERANCES = {
    "fp32": Tolerance(1e-5, 1e-4, 1e-3, 1e-3),
    "bf16": Tolerance(1e-3, 2e-2, 1e-1, 1e-1),
    "fp16": Tolerance(1e-3, 2e-2, 1e-1, 1e-1),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One training: its curves, what its checkpoint holds, and what it cost.

    Args:
        losses, gradient_norms: of each step.
        parameters, moments: by name, after the last step.
        peak_bytes: the largest growth of a rank's memory between the steps; with CUDA of the GPU's.
        samples_per_second: of all ranks together.
    """

    losses: np.ndarray
    gradient_norms: np.ndarray
    parameters: dict[str, Tensor]
    moments: dict[str, Tensor]
    peak_bytes: int
    samples_per_second: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How an engine compares with one process.

    Args:
        case, precision: what was tried.
        differences: from one process, as in `Tolerance`; None where the engine failed.
        is_repeatable: whether a second training gave the same bits.
        peak_bytes, samples_per_second: as in `Outcome`.
        failure: what went wrong, in a line; empty where nothing did.
    """

    case: Case
    precision: str
    differences: Tolerance | None = None
    is_repeatable: bool = False
    peak_bytes: int = 0
    samples_per_second: float = 0.0
    failure: str = ""

    @property
    def is_right(self) -> bool:
        """Whether the engine may be used."""
        if self.differences is None:
            return False
        allowed = TOLERANCES[self.precision]
        return self.is_repeatable and all(found <= most for found, most in zip(self.differences, allowed, strict=True))


def available_cases(muon: bool = False) -> list[Case]:
    """The engines whose library is installed; with `muon` those that can use it, and do."""
    has_fairscale = importlib.util.find_spec("fairscale") is not None
    cases = [case for case in CASES if has_fairscale or case.sharding_backend != "fairscale"]
    if not muon:
        return cases
    return [
        case._replace(muon=True) for case in cases if has_matrices(case.zero, case.sharding_backend, case.auto_wrap)
    ]


def verify_engines(
    cases: list[Case], processes: int, family: str, precisions: list[str], report: Callable[[str], None]
) -> Iterator[Verdict]:
    """Train with each engine and compare; yields a verdict for each engine and precision.

    Args:
        cases: engines, e.g. `available_cases()`.
        processes: of an engine.
        family: "mixlm" or "switch".
        precisions: of "fp32", "bf16" and "fp16".
        report: told what is being done.

    Raises:
        UserError: one process alone does not train.
    """
    with tempfile.TemporaryDirectory(prefix="mixlm-verify-") as folder:
        report("one process")
        reference = Path(folder) / "reference"
        failure = _train_on(1, CASES[0]._replace(muon=cases[0].muon), family, precisions, reference)
        if failure:
            raise UserError(f"one process alone does not train: {failure}")
        expected = {precision: _outcome(reference, precision, 1) for precision in precisions}
        for case in cases:
            report(case.name)
            where = Path(folder) / case.name.replace(" ", "-")
            failure = _train_on(processes, case, family, precisions, where)
            for precision in precisions:
                if failure:
                    yield Verdict(case, precision, failure=failure)
                    continue
                first, second = (_outcome(where, precision, repetition) for repetition in (1, 2))
                yield Verdict(
                    case,
                    precision,
                    _differences(first, expected[precision]),
                    _are_same(first, second),
                    second.peak_bytes,  # the first one's has libraries in it that are loaded only then
                    second.samples_per_second,
                )
            shutil.rmtree(where, ignore_errors=True)  # a gigabyte would come together


def _train_on(processes: int, case: Case, family: str, precisions: list[str], folder: Path) -> str:
    """Train in `folder`; returns what went wrong, in a line, or nothing."""
    task = [str(folder), json.dumps(case._asdict()), family, *precisions]
    return run_ranks("mixlm.training.verification", task, processes, timeout=TIMEOUT_SECONDS)


def _outcome(folder: Path, precision: str, repetition: int) -> Outcome:
    run = folder / _run_name(precision, repetition)
    curves = read_curves(run)
    checkpoint = checkpoints_in(run / CHECKPOINTS)[-1]
    cost = json.loads((run / "cost.json").read_text("utf-8"))
    return Outcome(
        np.array([value for _, value in curves["train/loss"]]),
        np.array([value for _, value in curves["train/grad_norm"]]),
        load_file(checkpoint / MODEL_FOLDER / "model.safetensors"),
        load_file(checkpoint / OPTIMIZER_FILE),
        **cost,
    )


def _run_name(precision: str, repetition: int) -> str:
    return f"{precision}-{repetition}"


def _differences(found: Outcome, expected: Outcome) -> Tolerance:
    def relative(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.max(np.abs(one - other) / np.abs(other))) if len(one) == len(other) else float("inf")

    def largest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        """The largest difference of any entry, as a share of the largest entry of its kind."""
        if one.keys() != other.keys():
            return float("inf")
        scales: dict[str, float] = {}
        for name, tensor in other.items():
            kind = name.partition("/")[0]
            scales[kind] = max(scales.get(kind, 0.0), float(tensor.abs().max()))
        return max(
            float((tensor - other[name]).abs().max()) / (scales[name.partition("/")[0]] or 1.0)
            for name, tensor in one.items()
        )

    return Tolerance(
        relative(found.losses, expected.losses),
        relative(found.gradient_norms, expected.gradient_norms),
        max(float((tensor - expected.parameters[name]).abs().max()) for name, tensor in found.parameters.items())
        / (LEARNING_RATE * STEPS),
        largest(found.moments, expected.moments),
    )


def _are_same(one: Outcome, other: Outcome) -> bool:
    """Whether two trainings gave the same bits."""
    return all(
        left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())
        for left, right in ((one.parameters, other.parameters), (one.moments, other.moments))
    )


# -- in each of the processes ----------------------------------------------------------------------------------------

LEARNING_RATE = 1e-3


@exits_on_user_error
def main(folder: str, case: str, family: str, *precisions: str) -> None:
    """Train twice in each precision; the checkpoints, curves and cost.json of each are in a run folder below."""
    torch.set_num_threads(1)
    for precision in precisions:
        for repetition in (1, 2):
            accelerator = _train(folder, json.loads(case), family, precision, repetition)
    accelerator.end_training()


def _train(folder: str, case: dict[str, Any], family: str, precision: str, repetition: int):
    ranks = int(os.environ["WORLD_SIZE"])
    arguments = TrainingArguments(
        model_name=_run_name(precision, repetition),
        output_dir=folder,
        train_batch_size=ROWS // ranks // MICRO_BATCHES,
        gradient_accumulation_steps=MICRO_BATCHES,
        learning_rate=LEARNING_RATE,
        # Large beside the smallest gradients: AdamW would make a full step of what is rounding alone.
        adam_epsilon=1e-4,
        num_steps=STEPS,
        logging_steps=1,
        save_steps=0,
        fp16=precision == "fp16",
        bf16=precision == "bf16",
        **case,
    )
    accelerator = prepare_run(arguments)
    config_class, model_class, fields = FAMILIES[family]
    memory = MemoryMeter(accelerator.device)
    before = memory.level()
    model = model_class(config_class(**SHAPE, **fields))
    cost = {}

    def batches(position: Position) -> Iterator[tuple[Position, list[Batch]]]:
        for number in range(position.batch, sys.maxsize):  # fp16 may skip steps: there is no knowing how many
            if number == 0:
                memory.restart()
                started = time.perf_counter()
            else:
                cost["samples_per_second"] = number * ROWS / (time.perf_counter() - started)
            cost["peak_bytes"] = memory.peak() - before
            yield Position(batch=number + 1), _micro_batches(number)

    train(model, SentenceOrderObjective, batches, arguments, accelerator, evaluate=lambda engine: {})
    peaks = accelerator.gather(torch.tensor([cost["peak_bytes"]], device=accelerator.device))
    if accelerator.is_main_process:
        cost["peak_bytes"] = int(peaks.max())
        (arguments.run_folder / "cost.json").write_text(json.dumps(cost), "utf-8")
    return accelerator


def _micro_batches(number: int) -> list[Batch]:
    """This rank's part of a global batch that is the same on any number of ranks."""
    random = np.random.default_rng(number)
    rows = []
    for length in random.integers(LONGEST // 2, LONGEST + 1, ROWS):
        input_ids = random.integers(10, VOCABULARY, length)
        labels = np.where(random.random(length) < 0.05, input_ids, IGNORE)
        labels[1] = input_ids[1]
        rows.append({"input_ids": input_ids, "labels": labels, "sentence_order_label": int(random.integers(2))})
    runs = [rows[first::MICRO_BATCHES] for first in range(MICRO_BATCHES)]
    return [collate(run[this_rank() :: number_of_ranks()], pad_token_id=0) for run in runs]


if __name__ == "__main__":
    main(*sys.argv[1:])
