"""The training loop of every script: one optimizer step after another, on one process or many."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from ..data.batching import Position
from ..errors import UserError
from ..files import whole_folder
from .arguments import TrainingArguments
from .checkpoint import TrainingState, checkpoints_in, load_checkpoint, prune, save_checkpoint
from .launch import start_missing_processes
from .objectives import Batch, SentenceOrderObjective
from .optimization import build_optimizer, learning_rate_factor
from .tracking import Progress

START = Position(epoch=0, window=0, batch=0, step_in_epoch=0)


def prepare_run(arguments: TrainingArguments) -> Accelerator:
    """Make the run's folder, seed the process, and start accelerate with TensorBoard in the folder.

    Raises:
        UserError: the folder cannot be written or belongs to an earlier run; fp16 without a CUDA device; the processes
            of the launcher do not find each other.
    """
    precision = "fp16" if arguments.fp16 else "bf16" if arguments.bf16 else "no"
    if arguments.fp16 and not torch.cuda.is_available():
        # accelerate would go on in fp32 without a word.
        raise UserError("--fp16: there is no CUDA device here; leave it out for fp32, or use --bf16")
    start_missing_processes()
    disable_progress_bar()  # of saving and loading weights: they would break the one of the training
    folder = arguments.run_folder
    accelerator = Accelerator(
        # Without this, ranks on CPUs would not find each other, and each would train alone.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=precision,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder)),
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise UserError(
            f"{launched} processes were launched and {accelerator.num_processes} found each other; "
            "on CPUs set ACCELERATE_USE_CPU=true"
        )
    if accelerator.is_main_process:
        _claim(folder, arguments)
    accelerator.wait_for_everyone()
    torch.manual_seed(arguments.seed)
    return accelerator


def _claim(folder: Path, arguments: TrainingArguments) -> None:
    if folder.is_dir() and any(folder.iterdir()) and arguments.checkpoint is None:
        if not arguments.overwrite_output_dir:
            raise UserError(
                f"{folder}: an earlier run is there; go on with --checkpoint latest, choose another --model_name, "
                "or give --overwrite_output_dir"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output_dir {arguments.output_dir}: cannot be written: {error}") from error


def find_checkpoint(arguments: TrainingArguments) -> Path | None:
    """The checkpoint folder that `--checkpoint` names, or None to start anew.

    Raises:
        UserError: 'latest' and there is none, or the folder does not exist.
    """
    if arguments.checkpoint is None:
        return None
    if arguments.checkpoint == "latest":
        found = checkpoints_in(arguments.run_folder / "checkpoints")
        if not found:
            raise UserError(f"--checkpoint latest: no checkpoint in {arguments.run_folder / 'checkpoints'}")
        return found[-1]
    if not Path(arguments.checkpoint).is_dir():
        raise UserError(f"--checkpoint {arguments.checkpoint}: no such folder; 'latest' takes the run's newest")
    return Path(arguments.checkpoint)


def changed_arguments(earlier: dict[str, Any], arguments: TrainingArguments) -> dict[str, tuple[Any, Any]]:
    """The arguments that differ from those a checkpoint was written with: name -> (before, now).

    A run may go on with another learning rate or batch size, but its user should see it.
    """
    about_the_run_alone = ("model_name", "output_dir", "checkpoint", "overwrite_output_dir")
    return {
        name: (earlier.get(name), value)
        for name, value in arguments.to_dict().items()
        if name not in about_the_run_alone and earlier.get(name) != value
    }


def train(
    model: nn.Module,
    objective_class: type[SentenceOrderObjective],
    batches: Callable[[Position], Iterator[tuple[Position, list[Batch]]]],
    arguments: TrainingArguments,
    accelerator: Accelerator,
    evaluate: Callable[[nn.Module], dict[str, float]],
) -> dict[str, float]:
    """Train for `arguments.num_steps` optimizer steps, from the start or from `arguments.checkpoint`.

    Args:
        model: a PreTrainedModel; trained in place.
        objective_class: what a step minimises.
        batches: from a position in the data, the micro-batches of this rank step by step, each with the position
            after the step.
        arguments: see `TrainingArguments`.
        accelerator: from `prepare_run`.
        evaluate: called with the model every `eval_steps` and at the end; returns metrics by name.

    Returns:
        the metrics of the last evaluation.

    Raises:
        UserError: the loss or the gradient is no longer a number (earlier checkpoints are kept), or the checkpoint
            does not fit.
    """
    optimizer = build_optimizer(model, arguments.learning_rate, arguments.weight_decay, arguments.adam_epsilon)
    state = TrainingState(0, START)
    checkpoint = find_checkpoint(arguments)
    model.to(accelerator.device)
    if checkpoint is not None:
        state, earlier_arguments = load_checkpoint(checkpoint, model, optimizer)
        accelerator.print(f"going on from {checkpoint} (step {state.step:,})")
        for name, (before, now) in changed_arguments(earlier_arguments, arguments).items():
            accelerator.print(f"  changed since then: {name} {before} -> {now}")
        if state.step >= arguments.num_steps:
            raise UserError(f"{checkpoint}: is at step {state.step}; give --num_steps above that to go on")
    elif accelerator.is_main_process:  # only now, when nothing can be wrong with the new run
        for name in ("checkpoints", "tensorboard"):
            shutil.rmtree(arguments.run_folder / name, ignore_errors=True)
    bare_model = model
    model, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.scaler is not None and state.scaler is not None:
        accelerator.scaler.load_state_dict(state.scaler)
    accelerator.init_trackers("tensorboard")
    objective = objective_class(accelerator, model)
    checkpoints = arguments.run_folder / "checkpoints"

    def evaluate_and_log() -> dict[str, float]:
        model.eval()
        metrics = evaluate(model)
        model.train()
        accelerator.log({f"eval/{name}": value for name, value in metrics.items()}, step=state.step)
        return metrics

    def save() -> None:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            state.scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
            target = checkpoints / f"step-{state.step:08d}"
            try:
                save_checkpoint(target, bare_model, optimizer.optimizer, state, arguments.to_dict())
            except OSError as error:
                raise UserError(
                    f"{target}: cannot be written: {error.strerror or error}; earlier checkpoints are kept; "
                    "make room and go on with --checkpoint latest"
                ) from error
            prune(checkpoints, arguments.keep_checkpoints, target)
        accelerator.wait_for_everyone()

    metrics: dict[str, float] = {}
    model.train()
    # Closed even after an error, so that its message gets a line of its own.
    with closing(Progress(accelerator, arguments.num_steps, state.step)) as progress:
        for position, micro_batches in batches(state.position):
            learning_rate = arguments.learning_rate * learning_rate_factor(
                state.step, arguments.warmup_steps, arguments.scheduler_num_steps
            )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            _seed_dropout(arguments.seed, state.step, accelerator.process_index)
            gradient_norm = _optimizer_step(
                model, optimizer, objective, micro_batches, arguments, accelerator, progress, state
            )
            state.step, state.position = state.step + 1, position
            progress.step()

            is_last = state.step == arguments.num_steps
            if state.step % arguments.logging_steps == 0 or is_last:
                progress.log(state.step, learning_rate, gradient_norm)
            if is_last or (arguments.save_steps and state.step % arguments.save_steps == 0):
                save()
                progress.pause()
            if is_last or (arguments.eval_steps and state.step % arguments.eval_steps == 0):
                metrics = evaluate_and_log()
                progress.pause()
            if is_last:
                break
    return metrics


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    """Dropout is a function of seed, step and rank, so that a resumed run needs no saved random state."""
    torch.manual_seed((seed * 1_000_003 + step) * 4_099 + rank)


def _optimizer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: SentenceOrderObjective,
    micro_batches: list[Batch],
    arguments: TrainingArguments,
    accelerator: Accelerator,
    progress: Progress,
    state: TrainingState,
) -> float:
    """Gradients of all micro-batches, clip, update. Returns the global gradient norm before clipping."""
    tokens = [_real_tokens(batch) for batch in micro_batches]
    micro_batches = [
        {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
        for batch in micro_batches
    ]
    step = objective.begin_step(micro_batches)
    for number, batch in enumerate(micro_batches):
        is_last = number == len(micro_batches) - 1
        # Gradients are exchanged once, with the last micro-batch.
        with nullcontext() if is_last else accelerator.no_sync(model):
            loss, terms = objective.loss(batch, number, step)
            # DistributedDataParallel averages over ranks; shares of a sum are to be added.
            accelerator.backward(loss * accelerator.num_processes)
        progress.add(terms, tokens[number])
    largest = arguments.max_grad_norm or math.inf
    gradient_norm = float(accelerator.clip_grad_norm_(model.parameters(), largest))
    if accelerator.scaler is None and not math.isfinite(gradient_norm):
        raise UserError(
            f"step {state.step + 1}: the loss or its gradient is not a number; the last good checkpoint is kept in "
            f"{arguments.run_folder / 'checkpoints'}; go on with a lower --learning_rate or more --warmup_steps"
        )
    optimizer.step()
    optimizer.zero_grad()
    return gradient_norm


def _real_tokens(batch: Batch) -> int:
    return sum(int(mask.sum()) for name, mask in batch.items() if name.endswith("attention_mask"))


def finish_run(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    metrics: dict[str, float],
    arguments: TrainingArguments,
    accelerator: Accelerator,
) -> None:
    """Put model, tokenizer and eval_results.json into the run's folder, and end the process group."""
    folder = arguments.run_folder
    if accelerator.is_main_process:
        with whole_folder(folder / "final") as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            results = {f"eval/{name}": value for name, value in metrics.items()}
            (partial / "eval_results.json").write_text(json.dumps(results, indent=2) + "\n", "utf-8")
        for path in (folder / "final").iterdir():
            os.replace(path, folder / path.name)
        (folder / "final").rmdir()
        for name, value in metrics.items():
            print(f"  {name:>16}  {value:,.4f}")
        print(f"model, tokenizer and results are in {folder}; draw its curves with: mixlm report {folder}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
