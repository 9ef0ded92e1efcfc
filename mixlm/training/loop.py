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
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from ..data.batching import Position
from ..errors import UserError
from ..files import whole_folder
from .arguments import TrainingArguments
from .checkpoint import TrainingState, checkpoints_in, load_checkpoint, prune, read_state, save_checkpoint, step_of
from .launch import start_missing_processes
from .objectives import Batch, PretrainingObjective
from .optimization import build_optimizer, learning_rate_factor
from .tracking import Progress

# What a finished run has put into its folder, and what a new one in its place removes. The configuration comes last:
# without it the folder is no model.
FINAL_FOLDER, CONFIGURATION_FILE, RESULTS_FILE = "final", "config.json", "eval_results.json"
REMOVED_BY_A_NEW_RUN = (
    "checkpoints",
    "tensorboard",
    CONFIGURATION_FILE,
    RESULTS_FILE,
    "model.safetensors",
    "curves.png",
)


def prepare_run(arguments: TrainingArguments) -> Accelerator:
    """Make the run's folder, seed the process, and start accelerate with TensorBoard in the folder.

    Raises:
        UserError: the folder cannot be written or belongs to an earlier run; there is no such checkpoint; fp16 without
            a CUDA device.
    """
    find_checkpoint(arguments)
    start_missing_processes()
    disable_progress_bar()  # of saving and loading weights: they would break the one of the training
    folder = arguments.run_folder
    accelerator = Accelerator(
        # Without this, ranks on CPUs would not find each other, and each would train alone.
        cpu=not torch.cuda.is_available(),
        mixed_precision="fp16" if arguments.fp16 else "bf16" if arguments.bf16 else None,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder)),
    )
    if (arguments.fp16 or accelerator.mixed_precision == "fp16") and not torch.cuda.is_available():
        # accelerate would go on in fp32 without a word.
        raise UserError("--fp16: there is no CUDA device here; leave it out for fp32, or use --bf16")
    on_main_process(accelerator, lambda: _claim(folder, arguments))
    torch.manual_seed(arguments.seed)
    return accelerator


def on_main_process(accelerator: Accelerator, action: Callable[[], None]) -> None:
    """Let the main process do something while the others wait; its UserError is raised on all of them."""
    message: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            action()
        except UserError as error:
            message = [str(error)]
    broadcast_object_list(message)
    if message[0] is not None:
        raise UserError(message[0])


def _claim(folder: Path, arguments: TrainingArguments) -> None:
    checkpoint = find_checkpoint(arguments)
    goes_on = checkpoint is not None and folder.resolve() in checkpoint.resolve().parents
    if folder.is_dir() and any(folder.iterdir()) and not (goes_on or arguments.overwrite_output_dir):
        go_on = "go on with --checkpoint latest, " if checkpoints_in(folder / "checkpoints") else ""
        raise UserError(
            f"{folder}: an earlier run is there; {go_on}choose another --model_name, or give --overwrite_output_dir"
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
        UserError: 'latest' and there is none, the folder does not exist, or it is no checkpoint.
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
    read_state(Path(arguments.checkpoint))
    return Path(arguments.checkpoint)


def changed_arguments(earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs from the arguments a checkpoint was written with: name -> (before, now).

    A run may go on with another learning rate, batch size or number of processes, but its user should see it.
    """
    about_the_run_alone = ("model_name", "output_dir", "checkpoint", "overwrite_output_dir")
    return {
        name: (earlier.get(name), value)
        for name, value in now.items()
        if name not in about_the_run_alone and earlier.get(name) != value
    }


def train(
    model: nn.Module,
    objective_class: type[PretrainingObjective],
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
    state = TrainingState(0, Position())
    resolved = {**arguments.to_dict(), "processes": accelerator.num_processes}
    checkpoint = find_checkpoint(arguments)
    model.to(accelerator.device)
    if checkpoint is not None:
        state, earlier_arguments = load_checkpoint(checkpoint, model, optimizer)
        accelerator.print(f"going on from {checkpoint} (step {state.step:,})")
        for name, (before, now) in changed_arguments(earlier_arguments, resolved).items():
            accelerator.print(f"  changed since then: {name} {before} -> {now}")
        if state.step > arguments.num_steps:
            raise UserError(f"{checkpoint}: is at step {state.step}; give --num_steps of that or more to go on")
    elif accelerator.is_main_process:  # only now, when nothing can be wrong with the new run
        for name in REMOVED_BY_A_NEW_RUN:
            path = arguments.run_folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    bare_model = model
    model, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.scaler is not None and state.scaler is not None:
        accelerator.scaler.load_state_dict(state.scaler)
    # What an interrupted run has logged after its checkpoint is logged again.
    accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": state.step + 1}})
    objective = objective_class(accelerator, model)
    checkpoints = arguments.run_folder / "checkpoints"
    # The checkpoints that lead here. When a run goes back to an earlier one, those after it are not among them.
    ancestors = [path for path in checkpoints_in(checkpoints) if step_of(path) <= state.step]

    def evaluate_and_log() -> dict[str, float]:
        model.eval()
        metrics = evaluate(model)
        model.train()
        accelerator.log({f"eval/{name}": value for name, value in metrics.items()}, step=state.step)
        return metrics

    def save() -> None:
        state.scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
        target = checkpoints / f"step-{state.step:08d}"
        try:
            save_checkpoint(target, bare_model, optimizer.optimizer, state, resolved)
        except OSError as error:
            raise UserError(
                f"{target}: cannot be written: {error.strerror or error}; make room; {_how_to_go_on(arguments)}"
            ) from error
        if target not in ancestors:
            ancestors.append(target)
        prune(checkpoints, ancestors[-arguments.keep_checkpoints :])

    model.train()
    # Closed even after an error, so that its message gets a line of its own.
    with closing(Progress(accelerator, arguments.num_steps, state.step)) as progress:
        steps = batches(state.position) if state.step < arguments.num_steps else ()
        for position, micro_batches in steps:
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
                on_main_process(accelerator, save)
                progress.pause()
            if is_last:
                break
            if arguments.eval_steps and state.step % arguments.eval_steps == 0:
                evaluate_and_log()
                progress.pause()
    return evaluate_and_log()


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    """Dropout is a function of seed, step and rank, so that a resumed run needs no saved random state."""
    torch.manual_seed((seed * 1_000_003 + step) * 4_099 + rank)


def _optimizer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: PretrainingObjective,
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
        if accelerator.scaler is not None:  # which turns the gradient of a loss that is no number into a skipped step
            _require_number(float(loss.detach()), state, arguments)
        progress.add(terms, tokens[number])
    largest = arguments.max_grad_norm or math.inf
    gradient_norm = float(accelerator.clip_grad_norm_(model.parameters(), largest))
    if accelerator.scaler is None:  # with one, an overflow of the gradient only skips the step
        _require_number(gradient_norm, state, arguments)
    optimizer.step()
    optimizer.zero_grad()
    return gradient_norm


def _require_number(value: float, state: TrainingState, arguments: TrainingArguments) -> None:
    if not math.isfinite(value):
        raise UserError(
            f"step {state.step + 1}: the loss or its gradient is not a number; use a lower --learning_rate or more "
            f"--warmup_steps; {_how_to_go_on(arguments)}"
        )


def _how_to_go_on(arguments: TrainingArguments) -> str:
    found = checkpoints_in(arguments.run_folder / "checkpoints")
    if found:
        return f"the last good checkpoint is {found[-1]}: go on with --checkpoint latest"
    return "no checkpoint was written yet: start again with --overwrite_output_dir"


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

    def write() -> None:
        try:
            with whole_folder(folder / FINAL_FOLDER) as partial:
                model.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
                results = {f"eval/{name}": value for name, value in metrics.items()}
                (partial / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", "utf-8")
            written = list((folder / FINAL_FOLDER).iterdir())
            for path in sorted(written, key=lambda path: path.name == CONFIGURATION_FILE):
                os.replace(path, folder / path.name)
            (folder / FINAL_FOLDER).rmdir()
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written: {error.strerror or error}; make room, then --checkpoint latest"
            ) from error
        for name, value in metrics.items():
            print(f"  {name:>16}  {value:,.4f}")
        print(f"model, tokenizer and results are in {folder}; draw its curves with: mixlm report {folder}")

    on_main_process(accelerator, write)
    accelerator.end_training()
