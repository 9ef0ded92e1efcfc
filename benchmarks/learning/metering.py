"""CPU time and tokens of training steps: budgets, and the abscissae of curves."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mixlm.data.batching import Position
from mixlm.training.objectives import Batch

STEPS_BEFORE_TIMING, TIMED_STEPS, TIMING_ROUNDS = 5, 25, 3

Steps = Iterator[tuple[Position, list[Batch]]]


class Meter:
    """CPU time and tokens of training steps, without what lies between them.

    Args:
        seconds, tokens: of the steps before.
    """

    def __init__(self, seconds: float = 0.0, tokens: int = 0):
        self.seconds, self.tokens = seconds, tokens
        self.started: float | None = None

    def over(self, steps: Steps) -> Steps:
        """The same steps, counted."""
        self.resume()
        for position, micro_batches in steps:
            for batch in micro_batches:
                masks = [mask for name, mask in batch.items() if name.endswith("attention_mask")]
                self.tokens += sum(int(mask.sum()) for mask in masks)
            yield position, micro_batches

    def pause(self) -> None:
        """Stop the clock."""
        if self.started is not None:
            self.seconds += time.process_time() - self.started
        self.started = None

    def resume(self) -> None:
        """Let the clock go on."""
        self.started = time.process_time()


class EnoughTimed(Exception):
    """Ends a training whose first steps were timed."""


class TimingMeter(Meter):
    """Times the first steps of a training, and ends it."""

    def over(self, steps: Steps) -> Steps:
        """The same steps.

        Raises:
            EnoughTimed: instead of more of them than are timed.
        """
        for number, step in enumerate(super().over(steps)):
            if number == STEPS_BEFORE_TIMING:
                self.seconds, self.tokens = 0.0, 0
                self.resume()
            if number == STEPS_BEFORE_TIMING + TIMED_STEPS:
                self.pause()
                raise EnoughTimed
            yield step


def time_steps(train: Callable[[Meter], object]) -> tuple[float, float]:
    """CPU seconds and tokens of a step, on average over the first of a training, which then ends.

    Args:
        train: trains from the start for more steps than are timed, which go through the meter's `over`.
    """
    meter = TimingMeter()
    try:
        train(meter)
    except EnoughTimed:
        return meter.seconds / TIMED_STEPS, meter.tokens / TIMED_STEPS
    raise RuntimeError("the training ended before its steps were timed")


def cost_of_a_step(train: Callable[[Meter], object], file: Path) -> tuple[float, float]:
    """CPU seconds and tokens of a step, as measured when a run was first begun.

    A busy machine makes CPU time longer, by a third and more, but never shorter: the same steps are timed several
    times, and the shortest time counts.

    Args:
        train: as in `time_steps`.
        file: where the cost is kept, so that a run that goes on has the same budget.
    """
    if not file.is_file():
        file.write_text(json.dumps(min(time_steps(train) for _ in range(TIMING_ROUNDS))))
    return tuple(json.loads(file.read_text()))
