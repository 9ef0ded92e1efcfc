"""Two-rank runs that are killed: started as a program, which forks the ranks from a process with everything loaded.

A line of JSON on stdin asks for a run, a line on stdout answers: {"exit_codes": [...], "seconds": ..., "events": ...}.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torch.utils.tensorboard  # noqa: F401 - as the next: loaded here, and not by each rank
from small_runs import build_arguments, run_small

import mixlm.training.sharding.torch_engines  # noqa: F401

RANKS = 2
# What Python does with files, as its audit hooks tell. safetensors writes in Rust: only its end is seen.
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "os.listdir")


def count_file_events(folder: str, fatal: int | None, counter) -> None:
    """Count what is done with files in `folder`; with number `fatal` the process is killed before it is done."""

    def hook(event: str, arguments: tuple) -> None:
        if event in FILE_EVENTS and any(folder in str(argument) for argument in arguments):
            counter.value += 1
            if counter.value == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run_rank(rank: int, port: int, output_dir: str, arguments: dict, fatal: int | None, counter) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    with open(os.devnull, "w") as silence:
        os.dup2(silence.fileno(), 1)
        os.dup2(silence.fileno(), 2)
    if rank == 0:
        count_file_events(str(Path(output_dir) / "run" / "checkpoints"), fatal, counter)
    run_small(build_arguments(output_dir, **arguments))
    torch.distributed.destroy_process_group()
    os._exit(0)


def run(output_dir: str, arguments: dict, kill_after: float | None = None, fatal: int | None = None) -> dict:
    """Both ranks die at `kill_after` seconds, or rank 0 with its file event `fatal` and the other then."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    counter = context.Value("i", 0)
    started = time.monotonic()
    ranks = [
        context.Process(target=run_rank, args=(rank, port, output_dir, arguments, fatal, counter))
        for rank in range(RANKS)
    ]
    for each in ranks:
        each.start()
    while any(each.is_alive() for each in ranks):
        time.sleep(0.005)
        died = any(each.exitcode not in (None, 0) for each in ranks)
        if died or (kill_after is not None and time.monotonic() - started > kill_after):
            for each in ranks:
                each.kill()
    for each in ranks:
        each.join()
    return {
        "exit_codes": [each.exitcode for each in ranks],
        "seconds": time.monotonic() - started,
        "events": counter.value,
    }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
