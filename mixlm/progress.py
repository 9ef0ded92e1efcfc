"""Progress bars: drawn over and over on a terminal, and a line now and then in a log."""

import os
import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_PER_LINE = 30.0

_are_hidden = False


class LogLines:
    """What tqdm draws on where nothing can be drawn over: its state becomes a line every half minute, and at its end.

    Args:
        stream: the log.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.state = ""
        self.written = ""
        self.next_line = time.monotonic() + SECONDS_PER_LINE

    def write(self, text: str) -> None:
        """Take what tqdm writes: a state, blanks over the one before, or the line's end where a bar stays."""
        if text == "\n":
            is_due = _without_times(self.state) != _without_times(self.written)
        else:
            self.state = text.strip()
            is_due = self.state != "" and time.monotonic() >= self.next_line
        if is_due:
            self.stream.write(self.state + "\n")
            self.written = self.state
            self.next_line = time.monotonic() + SECONDS_PER_LINE

    def flush(self) -> None:
        """Let the log be read."""
        self.stream.flush()


def _without_times(state: str) -> str:
    return state.partition("[")[0]


def draws_over() -> bool:
    """Whether what is written to standard error can be drawn over: a terminal, or a notebook, which is none."""
    try:
        return "ipykernel" in sys.modules or sys.stderr.isatty()
    except (AttributeError, ValueError):  # it is something else, or closed
        return False


def hide_progress_bars() -> None:
    """Show none in this process from now on: another says how far all of them are."""
    global _are_hidden
    _are_hidden = True


def progress_bar(iterable: Iterable | None = None, *, delay: float = 2, **options: Any) -> tqdm:
    """tqdm's bar on standard error, in lines of their own where that is a file or a pipe; on the first rank alone.

    Args:
        iterable: what is gone through, if not by `update`.
        delay: seconds before it appears.
        options: more of tqdm's.
    """
    if _are_hidden or sys.stderr is None or os.environ.get("RANK", "0") != "0":
        options["disable"] = True
    elif not draws_over():
        options |= {"file": LogLines(sys.stderr), "position": 0}  # so that nested bars do not move up and down
    return tqdm(iterable, delay=delay, **options)
