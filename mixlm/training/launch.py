"""Starting the ranks of a run: by this package itself, or by `accelerate launch` as its user means it."""

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

import psutil

from ..errors import UserError

# Each launcher that starts one process per rank says in one of these which rank a process is.
RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def start_missing_processes() -> None:
    """Replace this process by N ranks where accelerate's launcher was asked for N on CPUs and started one.

    accelerate leaves several CPU processes to mpirun: without it, it prepares an address for them to meet, starts the
    script once and says nothing, and the one process would train alone on a smaller global batch. Does nothing in any
    other situation.

    Raises:
        UserError: the launcher's command line does not say how many processes were meant.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    several_were_meant = on_cpu and "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ
    if not several_were_meant or any(name in os.environ for name in RANK_VARIABLES):
        return
    parent = psutil.Process().parent()
    launcher = [] if parent is None else parent.cmdline()
    processes = option_value(launcher, "num_processes")
    if processes is None or option_value(launcher, "num_machines") not in (None, "1"):
        raise UserError(
            "accelerate launch started one process where several were configured; on CPUs use "
            "torchrun --nproc_per_node N (with --nnodes for several machines)"
        )
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", processes]
    meeting_point = ["--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]]
    os.execv(sys.executable, [sys.executable, *torchrun, *meeting_point, *sys.argv])


def option_value(command_line: list[str], name: str) -> str | None:
    """The value of `--name value` or `--name=value` in a command line, with dashes or underscores; None if absent."""
    for word, following in zip(command_line, [*command_line[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option.startswith("--") and option[2:].replace("-", "_") == name:
            return value if equals else following
    return None


def run_ranks(
    module: str, arguments: Sequence[str], processes: int, threads: int = 1, timeout: float | None = None
) -> str:
    """Run a module of this package as so many ranks on this machine, and wait for their end.

    Args:
        module: for `python -m`.
        arguments: of its command line.
        processes: how many.
        threads: of each, unless OMP_NUM_THREADS says otherwise.
        timeout: seconds after which they are ended; None is never.

    Returns:
        what went wrong, in a line, or nothing.
    """
    # Freed memory goes back at once, so that the peak of a training is its own.
    memory = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    launcher = subprocess.Popen(
        [sys.executable, *torchrun, "-m", module, *arguments],
        env={"OMP_NUM_THREADS": str(threads), **os.environ, **memory},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        _, said = launcher.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"no end after {timeout:,.0f} seconds"
    finally:
        _kill(launcher)
    if launcher.returncode == 0:
        return ""
    lines = [line.strip() for line in said.splitlines()]
    # What a rank says first, or else what torchrun says of how it ended.
    telling = [line for line in lines if "rror" in line and "ChildFailed" not in line] + [
        line for line in lines if line.startswith(("error", "exitcode")) or "Signal" in line
    ]
    return telling[0] if telling else f"exit code {launcher.returncode}"


def _kill(launcher: subprocess.Popen) -> None:
    """End a launcher that still runs, and its ranks, which would live on without it."""
    if launcher.poll() is None:
        process = psutil.Process(launcher.pid)
        process.suspend()  # so that it starts no other while they are looked for
        ranks = process.children(recursive=True)
        launcher.kill()
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.kill()
        launcher.communicate()
