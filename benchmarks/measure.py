"""How the benchmarks measure: competitors in turns, peak memory in a fresh process, and what a result is.

Started as a program this module is the fresh process: `python measure.py MODULE:FUNCTION JSON`.
"""

import gc
import importlib
import json
import operator
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
PROC = Path("/proc/self")


@dataclass
class Result:
    """What a benchmark found.

    Args:
        name: of the row.
        value: the number, in `unit`.
        unit: "x" is a ratio.
        target: a comparison and a number, such as ">= 1.8"; "" where there is none.
        shape: sizes of what was measured, for a reader.
        threads: how many computed.
        pairs: rounds in which the competitors took turns; 1 where nothing has to be repeated.
        command: measures it again; follows from the name.
    """

    name: str
    value: float
    unit: str
    target: str
    shape: str
    threads: int
    pairs: int
    command: str = ""

    def __post_init__(self):
        self.command = self.command or f"python benchmarks/run.py --only {self.name}"
        self.is_met()  # a target that cannot be read is found before anything is kept

    def is_met(self) -> bool | None:
        """Whether the value keeps the target; None without a target.

        Raises:
            ValueError: the target is not a comparison and a number.
        """
        if not self.target:
            return None
        comparison, _, bound = self.target.partition(" ")
        if comparison not in COMPARISONS or not bound:
            raise ValueError(
                f"{self.name}: target {self.target!r} is not one of {', '.join(COMPARISONS)} and a number"
            )
        return COMPARISONS[comparison](self.value, float(bound))


@dataclass
class Row:
    """One measurement, which fills one or several rows of the table.

    Args:
        names: of the results, in the order of the table.
        run: makes them; in any order, all of `names`.
        descriptions: what each is, by name, for the table; for a name that lacks one, the first line of `run`'s
            docstring stands.
    """

    names: tuple[str, ...]
    run: Callable[[], Iterable[Result]]
    descriptions: dict[str, str] = field(default_factory=dict)

    def description(self, name: str) -> str:
        """What the row `name` is, in one line."""
        return self.descriptions.get(name) or (self.run.__doc__ or "").strip().partition("\n")[0].rstrip(".")


def interleaved(
    competitors: dict[str, Callable[[], object]],
    pairs: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of each competitor, which take turns: A B A B ...

    What makes a machine slower for a while (heat, neighbours) so meets all of them.

    Args:
        competitors: by name; called in the order of the dictionary.
        pairs: rounds that are measured.
        warm_up: rounds before them that are not.
        clock: CPU time of this process by default: it does not count what other processes take. `time.perf_counter`
            is for work that waits, or that several processes or cores share.

    Returns:
        `pairs` numbers a competitor, in seconds, in the order of the rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    gc.collect()
    gc.freeze()  # what is there now is not garbage: collecting between the turns need not look at it again
    try:
        for number in range(warm_up + pairs):
            for name, competitor in competitors.items():
                gc.collect()  # outside of the clock: the garbage of one is not to be the other's work
                started = clock()
                competitor()
                elapsed = clock() - started
                if number >= warm_up:
                    seconds[name].append(elapsed)
    finally:
        gc.unfreeze()
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The median of each competitor, in seconds."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """The median of the rounds' ratios.

    Not the ratio of the medians: the two of a round ran right after each other, so that a slow spell of the machine
    cancels in their ratio, while the medians of the two may come from rounds minutes apart.
    """
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def gemm_peak(size: int = 2048, repeats: int = 5) -> float:
    """Floating-point operations a second and thread that a product of two fp32 [size, size] matrices reaches.

    The best of `repeats`: a peak is what the machine can do, and whatever disturbs it only takes away. On several
    threads it is the mean of a thread, because the clock adds the time of all of them.
    """
    import torch  # here, so that a process that measures memory need not have it

    left, right = torch.randn(size, size), torch.randn(size, size)
    product = torch.empty(size, size)
    seconds = interleaved({"product": lambda: torch.mm(left, right, out=product)}, repeats)["product"]
    return 2 * size**3 / min(seconds)


def peak_memory(prepare: str, **arguments: object) -> int:
    """Peak resident memory of a piece of work above the level just before it, in bytes.

    It is measured in a fresh process on one thread, so that nothing earlier is there to be used again, and freed
    memory goes back to the system at once.

    Args:
        prepare: "module:function". The function gets `arguments`, prepares (this is not measured) and returns the
            work: a callable without arguments.
        arguments: whatever JSON can carry.

    Raises:
        RuntimeError: the process failed, or this system cannot tell the peak of a part of a process.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
        # glibc: blocks of this size are mapped on their own and unmapped when freed, and a free top is given back.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }
    command = [sys.executable, __file__, prepare, json.dumps(arguments)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise RuntimeError(f"the process that measures the memory of {prepare} failed: {reason}")
    return int(child.stdout.split()[-1])


def _measure_peak(prepare: str, arguments: dict) -> int:
    """What `peak_memory` returns, in the process that does the work."""
    module, _, function = prepare.partition(":")
    work = getattr(importlib.import_module(module), function)(**arguments)
    gc.collect()
    try:
        (PROC / "clear_refs").write_text("5")  # the peak becomes the level of now (Linux, proc_pid_clear_refs(5))
    except OSError:
        return _growth_of_highest_level(work)
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


def _growth_of_highest_level(work: Callable[[], object]) -> int:
    """Without /proc: how much higher the highest level of the process is after the work than before it.

    Raises:
        RuntimeError: it is not higher, so preparing may have hidden the peak of the work.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if growth <= 0:
        raise RuntimeError(
            "peak memory cannot be measured here: there is no /proc/self/clear_refs to begin at the work, and "
            "preparing it took as much as the work itself; run this row on Linux"
        )
    return growth * unit


def _status_bytes(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in (PROC / "status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no line {name}")


if __name__ == "__main__":
    print(_measure_peak(sys.argv[1], json.loads(sys.argv[2])))
