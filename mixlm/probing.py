"""What a training takes on this machine, measured by a short one: memory, and tokens a second for `mixlm plan`."""

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForPreTraining, PreTrainedConfig

from .configuration import MixLMConfig, read_config
from .data.batching import Position
from .errors import UserError, exits_on_user_error
from .planning import Plan, Setting
from .profiling import random_batch
from .training.launch import run_ranks
from .training.loop import train
from .training.memory import MemoryMeter
from .training.objectives import Batch, InverseClozeObjective, SentenceOrderObjective
from .training.run import prepare_run

WARM_UP_STEPS = 2  # libraries are loaded, the moments made, DistributedDataParallel's buckets made anew
PROBE_TOKENS = 2048  # of a batch on a CPU: larger ones take long and are not faster


class Measurement(NamedTuple):
    """What a training showed.

    Args:
        peak_bytes: by which the memory of the rank that has most grew from before the model was made.
        tokens_per_second: of all ranks together.
    """

    peak_bytes: int
    tokens_per_second: float


def measure(config: PreTrainedConfig, rows: int, length: int, setting: Setting, steps: int) -> Measurement:
    """Train on random ids on this machine, with the loop of a real run, in processes of their own.

    Args:
        config: of the model.
        rows, length: of a rank's batch.
        setting: on which device is for this machine to say.
        steps: how many to measure.

    Raises:
        UserError: the training failed, for want of memory perhaps.
    """
    threads = 1 if setting.ranks > 1 else os.cpu_count()  # as torchrun, and as python alone
    with tempfile.TemporaryDirectory(prefix="mixlm-plan-") as folder:
        config.to_json_file(Path(folder) / "config.json", use_diff=False)
        task = json.dumps({"rows": rows, "length": length, "steps": steps, "setting": setting._asdict()})
        failure = run_ranks("mixlm.probing", [folder, task], setting.ranks, threads)
        if failure:
            raise UserError(f"the measurement failed: {failure}")
        return Measurement(*json.loads((Path(folder) / "measured.json").read_text("utf-8")))


def why_no_probe(plan: Plan) -> str | None:
    """Why this machine cannot show how fast a plan is; None where it can."""
    setting, gpus = plan.setting, torch.cuda.device_count()
    device = torch.device("cuda" if gpus else "cpu")
    here = gpus or os.cpu_count()
    if setting.device != device.type:
        return f"planned for {setting.device}, and this machine trains on {device.type}"
    if setting.ranks > here:
        return f"{setting.ranks:,} processes are planned, and this machine has {here} {'GPUs' if gpus else 'cores'}"
    if plan.rows > plan.most_rows or plan.use.total * (1 if gpus else setting.ranks) > MemoryMeter(device).available():
        return f"--zero {setting.zero} does not fit on this machine"
    return None


def probe(config: PreTrainedConfig, plan: Plan, length: int, steps: int) -> float:
    """Tokens a second of all ranks of a plan together; errors as in `measure`.

    A CPU gets no more rows than make PROBE_TOKENS, a GPU all.
    """
    most_rows = plan.rows if plan.setting.device == "cuda" else max(1, PROBE_TOKENS // length)
    return measure(config, min(plan.rows, most_rows), length, plan.setting, steps).tokens_per_second


class _Enough(Exception):
    """Ends a training without a checkpoint."""


@exits_on_user_error
def main(folder: str, task: str) -> None:
    """A process of `measure`: trains a tiny model, which loads every library, and then that of the task."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    asked = json.loads(task)
    setting = Setting(**asked["setting"])
    config = read_config(Path(folder) / "config.json")
    tiny = type(config).from_preset("mixlm-tiny" if isinstance(config, MixLMConfig) else "mixlm-switch-tiny")
    tiny.pretraining_objective = config.pretraining_objective
    _train(folder, "warm-up", tiny, 2, 16, 1, setting)
    measured = _train(folder, "measured", config, asked["rows"], asked["length"], asked["steps"], setting)
    if int(os.environ["RANK"]) == 0:
        (Path(folder) / "measured.json").write_text(json.dumps(measured), "utf-8")


def _train(
    folder: str, name: str, config: PreTrainedConfig, rows: int, length: int, steps: int, setting: Setting
) -> Measurement:
    micro_batches = 2 if setting.accumulates else 1
    arguments = setting.training_arguments(
        model_name=name,
        output_dir=folder,
        train_batch_size=rows,
        gradient_accumulation_steps=micro_batches,
        num_steps=sys.maxsize,
        warmup_steps=0,
    )
    accelerator = prepare_run(arguments)
    memory = MemoryMeter(accelerator.device)
    gc.collect()
    before, peak, seconds = memory.level(), 0, 0.0

    def batches(position: Position) -> Iterator[tuple[Position, list[Batch]]]:
        nonlocal peak, seconds
        for number in range(WARM_UP_STEPS + steps):
            if number == WARM_UP_STEPS:
                memory.restart()
                started = time.perf_counter()
            yield (
                Position(batch=number + 1),
                [random_batch(config, rows, length, setting.masked_share) for _ in range(micro_batches)],
            )
        peak, seconds = memory.peak() - before, time.perf_counter() - started
        raise _Enough

    objective = SentenceOrderObjective if config.pretraining_objective == "sop" else InverseClozeObjective
    model = AutoModelForPreTraining.from_config(config)
    with suppress(_Enough):
        train(model, objective, batches, arguments, accelerator, evaluate=lambda engine: {})
    peaks = accelerator.gather(torch.tensor([peak], device=accelerator.device))
    texts = 1 if config.pretraining_objective == "sop" else 2
    tokens = texts * rows * length * micro_batches * steps * accelerator.num_processes
    return Measurement(int(peaks.max()), tokens / seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
