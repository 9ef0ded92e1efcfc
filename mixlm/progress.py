"""Progress bars: drawn over and over on a terminal, and a line now and then in a log."""

import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_PER_LINE = 30.0


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
        self.state = text.strip() or self.state
        is_due = text == "\n" or time.monotonic() >= self.next_line
        if is_due and self._done(self.state) != self._done(self.written):
            self.stream.write(self.state + "\n")
            self.written = self.state
            self.next_line = time.monotonic() + SECONDS_PER_LINE

    @staticmethod
    def _done(state: str) -> str:
        """A state without its times: the last one comes again when a bar ends."""
        return state.partition("[")[0]

    def flush(self) -> None:
        """Let the log be read."""
        self.stream.flush()


def progress_bar(iterable: Iterable | None = None, *, is_shown: bool = True, delay: float = 2, **options: Any) -> tqdm:
    """tqdm's bar on standard error, in lines of their own where that is a file or a pipe.

    Args:
        iterable: what is gone through, if not by `update`.
        is_shown: False on all ranks but one.
        delay: seconds before it appears.
        options: more of tqdm's.
    """
    # Notebooks draw over, and are no terminal.
    if not sys.stderr.isatty() and "ipykernel" not in sys.modules:
        options |= {"file": LogLines(sys.stderr), "position": 0}  # so that nested bars do not move up and down
    return tqdm(iterable, disable=not is_shown, delay=delay, **options)
