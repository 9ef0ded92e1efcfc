"""The training loop of every script: one optimizer step after another, on one process or many."""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..data.batching import Position
from ..errors import RunStopped, UserError, file_error, is_without_room
from ..hub import open_repository
from ..loading import StoredSettings
from .arguments import TrainingArguments
from .batch_size import find_batch_size
from .batches import TrainingBatches
from .checkpoint import (
    Evaluation,
    TrainingState,
    checkpoint_of,
    checkpoints_in,
    load_checkpoint,
    prune,
    save_checkpoint,
    skeleton_of,
    step_of,
    verify,
)
from .memory import MemoryMeter
from .objectives import Batch, Objective, Term
from .optimization import OptimizerSettings, learning_rate_factor, matrices_of
from .precision import LossScale
from .publishing import CheckpointPusher
from .record import record_run
from .run import (
    CHECKPOINTS,
    CURVES,
    choose_checkpoint,
    is_of_run,
    on_main_process,
    remove_earlier_run,
    say,
)
from .sharding import Engine, build_engine, describe, sharding_units
from .stopping import StopRequest
from .tracking import CurveWriter, Progress

# A scale that has been halved this often has gone from its largest sensible value to none.
MOST_SKIPPED_STEPS_IN_A_ROW = 30


def changed_arguments(earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs from the arguments a checkpoint was written with: name -> (before, now).

    A run may go on with another learning rate, batch size or number of processes, but its user should see it.
    """
    of_no_consequence = ("model_name", "output_dir", "resume", "overwrite_output_dir", "max_minutes", "push_to_hub")
    of_no_consequence += ("warmup_ratio",)  # warmup_steps has come of it
    return {
        name: (earlier.get(name), value)
        for name, value in now.items()
        if name not in of_no_consequence
        and not name.startswith("hub_")
        and earlier.get(name) != value
        # What an older version did not have, and is off now, has not changed; nor has data whose hash it did not have.
        and (name in earlier or value and name != "data")
    }


def order_has_changed(earlier: dict[str, Any], now: dict[str, Any], ordered_by: Collection[str]) -> bool:
    """Whether rows come in another order than where a checkpoint was written, or other rows meet in a step.

    Args:
        earlier, now: resolved arguments, the number of processes, and what tells the data. What an older version did
            not know has not changed.
        ordered_by: what of these the order is of; beside them it is of the rows of a step, unless tokens cut it.
    """
    before = {**now, **earlier}
    if any(before[name] != now[name] for name in ordered_by):
        return True
    parts_before, parts_now = (each["gradient_accumulation_steps"] * each["processes"] for each in (before, now))
    if now["tokens_per_step"] is None:
        return parts_before * before["train_batch_size"] != parts_now * now["train_batch_size"]
    # A step has a row for each part, also where these have more tokens.
    fewest_rows = now["tokens_per_step"] // now["max_seq_length"]
    return parts_before != parts_now and max(parts_before, parts_now) > fewest_rows


def train(
    model: nn.Module,
    objective_class: type[Objective],
    batches: Callable[[Position], Iterator[tuple[Position, list[Batch]]]],
    arguments: TrainingArguments,
    accelerator: Accelerator,
    evaluate: Callable[[Engine], dict[str, float]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: StoredSettings | None = None,
) -> Evaluation:
    """Train for `arguments.num_steps` optimizer steps, from the start or from the checkpoint of `arguments.resume`.

    Args:
        model: a PreTrainedModel. It is trained in place and, with ZeRO, taken apart: what is left at the end is in the
            last checkpoint.
        objective_class: what a step minimises.
        batches: from a position in the data, the micro-batches of this rank step by step, each with the position
            after the step. With `TrainingBatches` a batch size can be found, and changed data is noticed.
        arguments: see `TrainingArguments`. A batch size that is to be found is set here, before `batches` is called.
        accelerator: from `prepare_run`.
        evaluate: called with the engine, which is to be called as the model, every `eval_steps` and at the end;
            returns metrics by name.
        tokenizer, settings: written into each checkpoint beside the model, so that it can be used from there.

    Returns:
        the last evaluation, or by `arguments.best_metric` the best: the checkpoint of its step is there.

    Raises:
        UserError: the loss or the gradient is no longer a number (earlier checkpoints are kept), or the checkpoint
            does not fit.
        RunStopped: a signal came or `max_minutes` are over; a checkpoint was saved.
    """
    run = _Run(model, objective_class, batches, arguments, accelerator, evaluate, tokenizer, settings)
    steps = batches(run.state.position) if run.state.step < arguments.num_steps else ()
    run.begin()  # only now, when nothing can be wrong with the new run
    # Closed even after an error, so that its message gets a line of its own.
    with run.stop_request, closing(run.progress):
        for position, micro_batches in steps:
            run.state.position = position
            if not run.optimizer_step(micro_batches):
                continue
            if run.state.step == arguments.num_steps:
                break
            reason = run.stop_request.reason()
            if run.is_evaluation_step() and not reason:
                run.keep_if_best(run.evaluate())
            run.state.evaluation_due = bool(run.is_evaluation_step() and reason)  # it is made when the run goes on
            if reason:
                run.save(must_succeed=True)
                raise RunStopped(f"{reason}: stopped after step {run.state.step:,}; {run.how_to_go_on()}")
            is_save_due = arguments.save_steps and run.state.step % arguments.save_steps == 0
            if is_save_due and run.saved_step != run.state.step:
                run.save(must_succeed=False)
        if run.saved_step != run.state.step:
            # It is made below, but what was best must be known to a run that is made longer.
            run.state.evaluation_due = arguments.best_metric is not None
            run.save(must_succeed=True)
    last = run.evaluate()
    run.keep_if_best(last)
    run.curves.close()
    return run.state.best or last


def _require_same_data(fingerprint: str | None) -> None:
    """Raise UserError, on all ranks, where one has other data than rank 0: each would take its rows out of another
    order, some rows twice and others never."""
    everywhere = gather_object([fingerprint])
    other = next((rank for rank, each in enumerate(everywhere) if each != everywhere[0]), None)
    if other is not None:
        raise UserError(
            f"rank {other} has other data than rank 0 ({everywhere[other]} and {everywhere[0]}); give all machines "
            "the same files and the same tokenizer"
        )


class _Run:
    """A training run between two steps: what the loop of `train` moves on."""

    def __init__(
        self,
        model: nn.Module,
        objective_class: type[Objective],
        batches: Callable[[Position], Iterator[tuple[Position, list[Batch]]]],
        arguments: TrainingArguments,
        accelerator: Accelerator,
        evaluate: Callable[[Engine], dict[str, float]],
        tokenizer: PreTrainedTokenizerBase | None,
        settings: StoredSettings | None,
    ):
        self.arguments, self.accelerator, self.evaluate_engine = arguments, accelerator, evaluate
        self.tokenizer, self.settings = tokenizer, settings
        self.stop_request = StopRequest(arguments.max_minutes, accelerator)
        self.state = TrainingState(0, Position())
        self.checkpoints = arguments.run_folder / CHECKPOINTS
        self.skeleton = skeleton_of(model)

        checkpoint = choose_checkpoint(arguments, accelerator)
        earlier_arguments, read_moments = {}, None
        if checkpoint is not None:
            self.state, earlier_arguments, read_moments = load_checkpoint(checkpoint, model)
            if (had_muon := bool(earlier_arguments.get("muon"))) != arguments.muon:
                way = "with" if had_muon else "without"
                raise UserError(f"{checkpoint}: was trained {way} --muon, whose moments differ; go on {way} it")
        self.engine = self._build_engine(model.to(accelerator.device))
        self.loss_scale = LossScale() if arguments.precision == "fp16" else None
        self.objective = objective_class(accelerator, self.engine)
        self.engine.train()
        data = batches.fingerprint() if isinstance(batches, TrainingBatches) else None
        _require_same_data(data)
        if arguments.train_batch_size == 0:
            self._find_batch_size(batches, earlier_arguments)
        self.resolved = {**arguments.to_dict(), "processes": accelerator.num_processes, "data": data}

        self.changed = changed_arguments(earlier_arguments, self.resolved) if checkpoint is not None else {}
        if checkpoint is not None:
            self._announce(checkpoint)
            if order_has_changed(earlier_arguments, self.resolved, (*arguments.ordered_by, "data")):
                self._begin_next_epoch()
            self.engine.load_moments(read_moments)
            if self.loss_scale is not None and self.state.scaler is not None:
                self.loss_scale.load_state_dict(self.state.scaler)
        # A run may also begin with a checkpoint of another.
        self.is_new = checkpoint is None or not is_of_run(checkpoint, arguments.run_folder)
        self.saved_step = None if self.is_new else self.state.step
        pushes = arguments.push_to_hub and arguments.hub_strategy == "every_save"
        self.pusher = CheckpointPusher(arguments) if pushes else None

    def begin(self) -> None:
        """Take possession of the run's folder, and of its repository."""
        arguments = self.arguments
        if arguments.push_to_hub:
            on_main_process(
                self.accelerator, lambda: open_repository(arguments.hub_model_id, arguments.hub_private_repo)
            )
        if self.is_new:
            on_main_process(self.accelerator, lambda: remove_earlier_run(arguments.run_folder))
        on_main_process(self.accelerator, lambda: record_run(arguments, self.resolved, self.state.step))
        # The checkpoints that lead here. When a run goes back to an earlier one, those after it are not among them.
        self.ancestors = [path for path in checkpoints_in(self.checkpoints) if step_of(path) <= self.state.step]
        if self.state.best and not self._is_whole(checkpoint_of(self.checkpoints, self.state.best.step)):
            self.state.best = None
        if self.state.best and (changed := [name for name in (*arguments.judged_by, "data") if name in self.changed]):
            say(self.accelerator, f"  {changed[0]} has changed: earlier evaluations say nothing of what is best")
            self.state.best = None
        # What an interrupted run has logged after its checkpoint is logged again.
        self.curves = CurveWriter(arguments.run_folder / CURVES, self.state.step)
        self.progress = Progress(self.accelerator, arguments.num_steps, self.state.step, self.curves)
        if self.state.evaluation_due and self.state.step < arguments.num_steps:
            self.keep_if_best(self.evaluate())

    def _is_whole(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is among those that lead here, and as it was written; the one gone on from is."""

        def look() -> bool:
            if checkpoint not in self.ancestors:
                return False  # of another run, or deleted since
            try:
                if step_of(checkpoint) != self.state.step:
                    verify(checkpoint)
            except UserError as error:
                print(f"passed over: {error}; it was the best, which others can become now")
                return False
            return True

        return on_main_process(self.accelerator, look)

    def _begin_next_epoch(self) -> None:
        """Where rows have another order, the rest of the epoch is not to be found: all of them come anew."""
        epoch = self.state.position.epoch
        if self.state.position != Position(epoch):
            self.state.position = Position(epoch + 1)
            say(self.accelerator, "  so its data comes in another order, and begins anew")

    def _announce(self, checkpoint: Path) -> None:
        say(self.accelerator, f"going on from {checkpoint} (step {self.state.step:,})")
        for name, (before, now) in self.changed.items():
            say(self.accelerator, f"  changed since then: {name} {before} -> {now}")
        if self.state.step > self.arguments.num_steps:
            raise UserError(f"{checkpoint}: is at step {self.state.step}; give --num_steps of that or more to go on")

    def _build_engine(self, model: nn.Module) -> Engine:
        arguments, ranks = self.arguments, self.accelerator.num_processes
        if arguments.zero and ranks == 1:
            say(self.accelerator, f"--zero {arguments.zero}: one process has nothing to share out; as --zero 0")
        units = sharding_units(model)
        if arguments.auto_wrap and arguments.zero < 2:
            say(self.accelerator, f"--auto_wrap: without effect with --zero {arguments.zero}")
        elif arguments.auto_wrap:
            say(self.accelerator, describe(units, ranks, matrices_of(model) if arguments.muon else ()))
        settings = OptimizerSettings(
            arguments.learning_rate, arguments.weight_decay, arguments.adam_epsilon, arguments.muon
        )
        units = units if arguments.auto_wrap else units[-1:]
        return build_engine(model, settings, arguments.precision, arguments.zero, arguments.sharding_backend, units)

    def _find_batch_size(self, batches: TrainingBatches, earlier_arguments: dict[str, Any]) -> None:
        """Set `train_batch_size` to what fits; model, optimizer and generators are afterwards as they were before.

        A run that goes on keeps the rows of its steps, and with them the order of its data.
        """
        arguments, ranks = self.arguments, self.accelerator.num_processes
        rows_per_step = arguments.effective_batch_size
        if rows_per_step is None and earlier_arguments:
            factors = ("train_batch_size", "gradient_accumulation_steps", "processes")
            rows_per_step = math.prod(earlier_arguments[name] for name in factors)
            if rows_per_step % ranks:
                raise UserError(
                    f"--resume: the steps of this run have {rows_per_step} rows, which {ranks} processes cannot share "
                    "equally; use another number of processes, or give --effective_batch_size"
                )
        meter = MemoryMeter(self.accelerator.device)
        accumulates = arguments.gradient_accumulation_steps > 1 or rows_per_step is not None

        def try_rows(rows: int) -> int:
            meter.restart()
            try:
                with torch.random.fork_rng([meter.device] if meter.on_gpu else []):
                    for _ in range(2):  # the moments, which the first step makes, are there in the second
                        self._backward([batches.longest(rows)] * (2 if accumulates else 1))
                        for gradient in self.engine.gradients():
                            gradient.zero_()  # an overflow in fp16 would reach the weights even at a rate of 0
                        self.engine.step(learning_rate=0.0)
                return meter.peak()
            finally:  # also when there was not enough memory
                self.engine.forget_gradients()
                self.engine.forget_moments()

        settings = {
            **{name: getattr(arguments, name) for name in arguments.fills_memory},
            "configuration": self.skeleton.config.to_diff_dict(),
            "longest": {name: list(tensor.shape) for name, tensor in batches.longest(1).items()},
            "ranks": ranks,
            "accumulates": accumulates,
        }
        rows_there_are = (rows_per_step or len(batches) // arguments.gradient_accumulation_steps) // ranks
        fitting = find_batch_size(
            try_rows, settings, arguments.memory_limit, meter, partial(say, self.accelerator), max(1, rows_there_are)
        )
        arguments.take_batch_size(fitting, None if rows_per_step is None else rows_per_step // ranks)

    def optimizer_step(self, micro_batches: list[Batch]) -> bool:
        """Gradients of all micro-batches, clip, update; False where fp16 overflowed and nothing was updated."""
        arguments, state = self.arguments, self.state
        _seed_dropout(arguments.seed, state.step, self.accelerator.process_index)
        loss, all_terms = self._backward(micro_batches)
        for batch, terms in zip(micro_batches, all_terms, strict=True):
            self.progress.add(terms, _real_tokens(batch))
        scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        gradient_norm = self.engine.gradient_norm() / scale
        if self.loss_scale is None:
            self._require_number(gradient_norm)
        elif not self.loss_scale.update(gradient_norm):
            # Where the gradient is no number, the scale was too large, or else the loss is no number either.
            self._require_number(float(self.accelerator.reduce(loss, "sum")))
            self.engine.forget_gradients()
            self._report_skipped_step()
            return False
        largest = arguments.max_grad_norm or math.inf
        self.engine.scale_gradients(min(1.0, largest / (gradient_norm + 1e-6)) / scale)
        learning_rate = arguments.learning_rate * learning_rate_factor(
            state.step, arguments.warmup_steps, arguments.scheduler_num_steps, arguments.decay_ratio
        )
        self.engine.step(learning_rate)
        state.step += 1
        if state.step % arguments.logging_steps == 0 or state.step == arguments.num_steps:
            self.progress.log(state.step, learning_rate, gradient_norm)
        self.progress.step()
        return True

    def _backward(self, micro_batches: list[Batch]) -> tuple[Tensor, list[dict[str, Term]]]:
        """The gradients of a step, summed over micro-batches and ranks.

        Returns:
            this rank's share of the loss, and the terms of each micro-batch.
        """
        micro_batches = [
            {name: tensor.to(self.accelerator.device, non_blocking=True) for name, tensor in batch.items()}
            for batch in micro_batches
        ]
        step = self.objective.begin_step(micro_batches)
        # The engines average over ranks; shares of a sum are to be added.
        factor = self.accelerator.num_processes * (1.0 if self.loss_scale is None else self.loss_scale.value)
        total, all_terms = torch.zeros((), device=self.accelerator.device), []
        for number, batch in enumerate(micro_batches):
            is_last = number == len(micro_batches) - 1
            # Gradients are exchanged once, with the last micro-batch.
            with nullcontext() if is_last else self.engine.no_sync():
                loss, terms = self.objective.loss(batch, number, step)
                (loss * factor).backward()
            total += loss.detach()
            all_terms.append(terms)
        return total, all_terms

    def _require_number(self, value: float) -> None:
        if not math.isfinite(value):
            raise UserError(
                f"step {self.state.step + 1}: the loss or its gradient is not a number; use a lower --learning_rate "
                f"or more --warmup_steps; {self.how_to_go_on()}"
            )

    def _report_skipped_step(self) -> None:
        skipped = self.loss_scale.skipped_in_a_row
        self.progress.write(
            f"step {self.state.step + 1}: the fp16 gradient overflowed; skipped, and the loss scale is now "
            f"{self.loss_scale.value:g}"
        )
        if skipped == MOST_SKIPPED_STEPS_IN_A_ROW:
            raise UserError(
                f"step {self.state.step + 1}: the fp16 gradient overflowed {skipped} times in a row; use a lower "
                f"--learning_rate, or --bf16; {self.how_to_go_on()}"
            )

    def how_to_go_on(self) -> str:
        """What a user can do when the run ends here."""
        if not self.ancestors:
            return "no checkpoint was written yet: start again with --overwrite_output_dir"
        last = self.ancestors[-1]
        # Of a run that has gone back to an earlier checkpoint, later ones are there until it has written one.
        is_newest = checkpoints_in(self.checkpoints)[-1:] == [last]
        return f"the last good checkpoint is {last}: go on with --resume {'auto' if is_newest else last}"

    def is_evaluation_step(self) -> bool:
        """Whether an evaluation belongs after this step."""
        return bool(self.arguments.eval_steps) and self.state.step % self.arguments.eval_steps == 0

    def evaluate(self) -> Evaluation:
        """Evaluate and log."""
        self.engine.eval()
        metrics = self.evaluate_engine(self.engine)
        self.engine.train()
        self.progress.record({f"eval/{name}": value for name, value in metrics.items()}, self.state.step)
        self.progress.pause()
        return Evaluation(self.state.step, metrics)

    def keep_if_best(self, found: Evaluation) -> None:
        """Where a metric says which model is best, write a checkpoint of one that is better than those before."""
        name, before = self.arguments.best_metric, self.state.best
        if name is None or (before is not None and found.metrics[name] <= before.metrics[name]):
            return
        self.state.best = found
        if self.saved_step != self.state.step and not self.save(must_succeed=False):
            self.state.best = before

    def save(self, must_succeed: bool) -> bool:
        """Write a checkpoint, and delete older ones but for the best.

        A run goes on when a checkpoint in its middle cannot be written.

        Returns:
            whether it was written.
        """
        self.state.scaler = None if self.loss_scale is None else self.loss_scale.state_dict()
        is_main = self.accelerator.is_main_process
        # Every rank takes part in putting a tensor together, and one writes it down.
        parameters, moments = (
            {name: tensor.cpu() for name, tensor in tensors if is_main}
            for tensors in (self.engine.whole_parameters(), self.engine.whole_moments())
        )
        target = checkpoint_of(self.checkpoints, self.state.step)
        ancestors = [*(path for path in self.ancestors if path != target), target]

        def write() -> bool:
            try:
                held = (parameters, moments, self.state, self.resolved, self.tokenizer, self.settings)
                save_checkpoint(target, self.skeleton, *held)
            except OSError as error:
                advice = "; make room" if is_without_room(error) else ""
                message = f"{target}: cannot be written: {error.strerror or error}{advice}"
                if must_succeed:
                    raise UserError(f"{message}; {self.how_to_go_on()}") from error
                self.progress.write(f"{message}; training goes on, and the next checkpoint is due as usual")
                return False
            try:
                best = [] if self.state.best is None else [checkpoint_of(self.checkpoints, self.state.best.step)]
                prune(self.checkpoints, [*ancestors[-self.arguments.save_total_limit :], *best])
            except OSError as error:
                self.progress.write(f"{file_error(error)}: an older checkpoint cannot be deleted; training goes on")
            # After the last one comes the finished model, and a stop is not to wait for an upload.
            if self.pusher is not None and not must_succeed and (failure := self.pusher.push(target)):
                self.progress.write(failure)
            return True

        is_written = on_main_process(self.accelerator, write)
        if is_written:  # on all ranks: each machine says how to go on
            self.ancestors = ancestors
        self.saved_step = self.state.step
        self.progress.pause()
        return is_written


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    """Dropout is a function of seed, step and rank, so that a resumed run needs no saved random state."""
    torch.manual_seed((seed * 1_000_003 + step) * 4_099 + rank)


def _real_tokens(batch: Batch) -> int:
    return sum(int(mask.sum()) for name, mask in batch.items() if name.endswith("attention_mask"))
