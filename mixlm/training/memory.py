"""How much memory a rank uses: of its GPU, or on a CPU of the machine."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from ..errors import UserError

PEAK_IS_WHAT_IS_THERE_NOW = "5"  # see proc(5), clear_refs
# The control groups of this process, and where they are mounted: see cgroups(7).
OWN_CONTROL_GROUPS, CONTROL_GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


class MemoryMeter:
    """The memory of this process on a device, and its peak since `restart`.

    On a CPU that is resident memory. Where there is no /proc (anywhere but Linux), the peak is that of the whole life
    of the process.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.device = device

    def level(self) -> int:
        """Bytes that are used now."""
        return torch.cuda.memory_allocated(self.device) if self.on_gpu else psutil.Process().memory_info().rss

    def restart(self) -> None:
        """Forget the peak so far."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        elif sys.platform == "linux":
            with suppress(OSError):  # some containers forbid it, and the peak is then that of the whole life too
                Path("/proc/self/clear_refs").write_text(PEAK_IS_WHAT_IS_THERE_NOW)

    def peak(self) -> int:
        """The most bytes that were used at once since `restart`."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated(self.device)
        if sys.platform == "linux":
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        import resource

        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else largest * 1024

    def available(self) -> int:
        """Bytes that this rank could still take: free memory, of a machine's its share."""
        if self.on_gpu:
            kept_by_torch = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return torch.cuda.mem_get_info(self.device)[0] + kept_by_torch
        free = min([psutil.virtual_memory().available, *_left_in_control_groups()])
        return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _left_in_control_groups() -> Iterator[int]:
    """Bytes that a container, or a job of a cluster, may still take, by each limit that it is under."""
    try:
        groups = [line.split(":", 2) for line in OWN_CONTROL_GROUPS.read_text().splitlines()]
    except OSError:  # this is no Linux
        return
    for _, controllers, name in groups:
        if controllers == "":  # of version 2, where one hierarchy has all
            top, limit, usage, cache = CONTROL_GROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, usage = CONTROL_GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # A group is within others. In a container its name can be the machine's, where only the top is to be seen.
        own = top / name.strip("/")
        for folder in (own, *own.parents):
            with suppress(OSError, ValueError):  # there is none, or "max"
                left = int((folder / limit).read_text()) - int((folder / usage).read_text())
                yield max(0, left + _statistic(folder, cache))  # which is given up when it is needed


def _statistic(group: Path, name: str) -> int:
    """Of a control group; 0 where it is not told."""
    with suppress(OSError, ValueError):
        for line in (group / "memory.stat").read_text().splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0


def parse_memory(flag: str, text: str) -> int:
    """ "900MB", "4GiB", "4096" (bytes), as `flag` was given it -> bytes.

    Raises:
        UserError: it is not a size.
    """
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text.strip()[len(number) :].strip().lower()
    try:
        size = float(number) * units[unit]
    except (ValueError, KeyError) as error:
        raise UserError(f"{flag}={text!r}: give a number and MB, MiB, GB or GiB, such as 4GB") from error
    if not 1 <= size < math.inf:
        raise UserError(f"{flag}={text!r}: must be a byte or more, and finite")
    return int(size)
