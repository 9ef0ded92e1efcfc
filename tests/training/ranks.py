"""Several ranks for tests: started once, and told again and again what to do."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_SECONDS = 120
# Loaded once for all ranks, which are forked from a process that has them: it takes each of them several seconds.
LOADED_BEFORE = [
    "mixlm.training.verification",
    "mixlm.training.sharding.torch_engines",
    "mixlm.training.sharding.fairscale_engines",
    "torch.utils.tensorboard",
]


class Ranks:
    """Processes with a gloo process group that call the same function at the same time.

    Args:
        number: of processes.
    """

    def __init__(self, number: int):
        self.number = number
        self.processes: list[multiprocessing.Process] = []
        self.connections: list[Connection] = []

    def __call__(self, function: Callable, *arguments: Any) -> list[Any]:
        """Call a function of an importable module on every rank; returns what each has returned.

        Raises:
            AssertionError: with its traceback where a rank has raised, or when there is no answer in time.
        """
        if not self.processes:
            self._start()
        for connection in self.connections:
            connection.send((function, arguments))
        results = []
        for rank, connection in enumerate(self.connections):
            try:
                succeeded, result = connection.recv() if connection.poll(TIMEOUT_SECONDS) else (False, "no answer")
            except EOFError:
                succeeded, result = False, "the process has ended"
            if not succeeded:
                self.stop()  # the others may wait for it in the middle of something
                raise AssertionError(f"rank {rank}: {result}")
            results.append(result)
        return results

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LOADED_BEFORE)
        for rank in range(self.number):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, self.number, port), daemon=True)
            process.start()
            self.processes.append(process)
            self.connections.append(here)

    def stop(self) -> None:
        """End the processes; the next call starts new ones."""
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.connections = [], []


def _serve(connection: Connection, rank: int, number: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(number),
        LOCAL_WORLD_SIZE=str(number),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        HF_HUB_OFFLINE="1",
    )
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            sys.exit()
        try:
            connection.send((True, function(*arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
