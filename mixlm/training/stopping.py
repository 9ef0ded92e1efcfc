"""Ending a run early without losing anything: by signal, or because its time is used up."""

import os
import signal
import threading
import time
from types import FrameType

import torch
from accelerate import Accelerator

# A launcher hands a signal on that the terminal has sent to every process already. What comes this soon after the
# first is the same wish.
ECHO_SECONDS = 2.0


class StopRequest:
    """Whether the run is to save and end: SIGTERM or SIGINT came, or `max_minutes` are over.

    A context manager: outside of it, signals do what they did before. A second signal ends the process at once.

    Args:
        max_minutes: of wall-clock time from now on; None is no limit.
        accelerator: joins the ranks, of which any may get a signal.
    """

    def __init__(self, max_minutes: float | None, accelerator: Accelerator):
        self.accelerator = accelerator
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.signal: signal.Signals | None = None
        self.signalled_at = 0.0
        self.earlier_handlers = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python has no signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self.earlier_handlers[number] = signal.signal(number, self._take_note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.earlier_handlers.items():
            signal.signal(number, handler)

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self.signalled_at = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self.signalled_at > ECHO_SECONDS:
            os._exit(128 + number)

    def reason(self) -> str | None:
        """Why the run is to end now, the same on every rank; None if it is not. To be called on all of them."""
        own = 0
        if self.signal is not None:
            own = int(self.signal)
        elif self.deadline is not None and time.monotonic() >= self.deadline:
            own = -1
        if self.accelerator.num_processes > 1:
            seen = torch.tensor([own, -own], device=self.accelerator.device)
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
            highest, lowest = int(seen[0]), -int(seen[1])
            own = highest or lowest
        return None if own == 0 else "--max_minutes are over" if own < 0 else signal.Signals(own).name
