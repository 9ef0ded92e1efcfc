"""The largest batch that fits: `--train_batch_size 0`."""

import hashlib
import json
import platform
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist

from ..errors import UserError
from ..files import cache_folder, json_text, write_whole
from .memory import MemoryMeter, parse_memory
from .sharding import number_of_ranks, this_rank

# Of the memory that is free, what a run leaves to others and to the unevenness of real batches.
MARGIN = 0.1
MOST_ROWS = 4096
PRECISION = 8  # the search ends when what fits and what does not differ by an eighth


class Trial(NamedTuple):
    """A batch that was tried: its rows, the peak of memory over all ranks, and whether that fits.

    Where `was_run` is false, the peak is what two smaller batches promise, and so far above the limit that nobody
    tried.
    """

    rows: int
    peak_bytes: int
    fits: bool
    was_run: bool


def find_batch_size(
    try_rows: Callable[[int], int],
    settings: dict[str, Any],
    limit: str | None,
    meter: MemoryMeter,
    say: Callable[[str], None],
    rows_there_are: int,
) -> int:
    """The most rows that fit on every rank, from a new search or an earlier one that had about as much memory.

    Args:
        try_rows: makes a training step with so many rows; returns this rank's peak in bytes.
        settings: what the answer depends on, beside the machine.
        limit: what a rank may use, such as "4GB"; None is all that is free, less the margin.
        meter: of this rank's device.
        say: prints, on one rank.
        rows_there_are: for a rank; no more are tried.

    Raises:
        UserError: not even one row fits.
    """
    remembered = RememberedSizes(cache_folder() / "batch_sizes.json")
    most_rows = min(MOST_ROWS, rows_there_are)
    fingerprint = _fingerprint({**settings, "limit": limit, "most_rows": most_rows}, meter)
    if limit is None:
        available = meter.available()
        own_limit, own_most = meter.level() + int((1 - MARGIN) * available), meter.level() + available
    else:
        own_limit = own_most = parse_memory("--memory_limit", limit)
    smallest_limit, smallest_most = (_over_ranks(own, min, meter) for own in (own_limit, own_most))
    known = _over_ranks(remembered.get(fingerprint, smallest_limit, smallest_most) or 0, min, meter)
    if known:
        say(f"--train_batch_size {known}, as was found on this machine before")
        return known

    def peak_of(rows: int) -> int:
        try:
            peak = try_rows(rows)
        except torch.OutOfMemoryError:
            if number_of_ranks() > 1:  # the others wait for this one in the middle of the step
                raise
            peak = smallest_limit + 1
        return _over_ranks(peak, max, meter)

    trials = largest_batch(peak_of, smallest_limit, most_rows)
    found = max(trial for trial in trials if trial.fits)
    say(_table(trials, smallest_limit))
    say(f"--train_batch_size {found.rows}")
    if this_rank() == 0:
        remembered.put(fingerprint, found, smallest_limit)
    return found.rows


def _over_ranks(number: int, smallest_or_largest: Callable, meter: MemoryMeter) -> int:
    """The smallest or the largest of the ranks' numbers, on all of them."""
    if number_of_ranks() == 1:
        return number
    numbers = [torch.zeros(1, dtype=torch.int64, device=meter.device) for _ in range(number_of_ranks())]
    dist.all_gather(numbers, torch.tensor([number], dtype=torch.int64, device=meter.device))
    return smallest_or_largest(map(int, numbers))


def largest_batch(try_rows: Callable[[int], int], limit: int, most_rows: int) -> list[Trial]:
    """Double the rows until a batch does not fit, then bisect; returns the trials, the last that fits is the answer.

    Memory is a straight line in the rows, near enough. A batch that the line through the last two trials puts above
    the limit is not run: a rank out of memory in the middle of an exchange would leave the others waiting.

    Args:
        try_rows: makes a training step with so many rows on every rank; returns the peak in bytes, the largest over
            the ranks.
        limit: bytes that a rank may use.
        most_rows: where to stop all the same.

    Raises:
        UserError: not even one row fits.
    """
    trials: list[Trial] = []

    def attempt(rows: int) -> bool:
        done = [trial for trial in trials if trial.was_run]
        if len(done) >= 2:
            (first, first_peak, *_), (second, second_peak, *_) = sorted(done)[-2:]
            promised = second_peak + (second_peak - first_peak) * (rows - second) // (second - first)
            if promised > limit:
                trials.append(Trial(rows, promised, fits=False, was_run=False))
                return False
        peak = try_rows(rows)
        trials.append(Trial(rows, peak, fits=peak <= limit, was_run=True))
        return peak <= limit

    low, high = 0, 1
    while high <= most_rows and attempt(high):
        low, high = high, 2 * high
    if low == 0:
        raise UserError(
            f"--train_batch_size 0: one row takes {_mebibytes(trials[0].peak_bytes)}, and {_mebibytes(limit)} may be "
            "used; use a smaller model, a shorter --max_seq_length, --zero 3, or more --memory_limit"
        )
    high = min(high, most_rows + 1)
    while high - low > max(1, low // PRECISION):
        middle = (low + high) // 2
        low, high = (middle, high) if attempt(middle) else (low, middle)
    return trials


def _table(trials: list[Trial], limit: int) -> str:
    lines = [f"searching the batch size: a process may use {_mebibytes(limit)}", f"{'rows':>8}  {'peak':>12}  verdict"]
    for trial in trials:
        verdict = "fits" if trial.fits else "too large" if trial.was_run else "too large, by what the others took"
        lines.append(f"{trial.rows:>8,}  {_mebibytes(trial.peak_bytes):>12}  {verdict}")
    return "\n".join(lines)


def _mebibytes(number: float) -> str:
    return f"{number / 2**20:,.0f} MiB"


class RememberedSizes:
    """Answers of earlier searches, by what they depend on.

    Args:
        path: of the file; one that is missing or damaged remembers nothing.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.sizes = dict(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, RecursionError, TypeError):
            self.sizes = {}

    def get(self, fingerprint: str, limit: int, most: int) -> int | None:
        """The rows that were found, unless they would not fit now, or many more might.

        Args:
            fingerprint: what they depend on.
            limit: bytes that a search would go up to now.
            most: bytes that there are, the margin beyond that limit included.
        """
        try:
            rows, peak, limit_then = (self.sizes[fingerprint][name] for name in ("rows", "peak", "limit"))
            is_good = rows >= 1 and peak <= most and limit <= (1 + MARGIN) * limit_then
        except (LookupError, TypeError):
            return None
        return rows if is_good else None

    def put(self, fingerprint: str, found: Trial, limit: int) -> None:
        """Remember what a search with `limit` bytes has found; without harm where the file cannot be written."""
        self.sizes[fingerprint] = {"rows": found.rows, "peak": found.peak_bytes, "limit": limit}
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json_text(self.sizes))


def _fingerprint(settings: dict[str, Any], meter: MemoryMeter) -> str:
    """A hash of the machine and of whatever else the answer depends on."""
    if meter.on_gpu:
        properties = torch.cuda.get_device_properties(meter.device)
        hardware = {"gpu": properties.name, "memory": properties.total_memory}
    else:
        hardware = {"cpu": platform.machine(), "memory": psutil.virtual_memory().total}
    everything = {**settings, **hardware, "torch": torch.__version__}
    return hashlib.blake2b(json.dumps(everything, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
