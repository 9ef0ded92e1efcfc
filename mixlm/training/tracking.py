"""The progress bar and the curves of a run: the same numbers in both."""

import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor

from ..errors import is_without_room
from ..progress import progress_bar
from .objectives import Term


class EventFile:
    """One of TensorBoard's files in a folder. They are read in the order of their names, which is that of time.

    Written in this thread: the errors of torch's SummaryWriter, which has its own, cannot be caught before they are
    printed.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self.records = RecordWriter(self.path.open("xb"))

    def add(self, **content: Any) -> None:
        """Write an event. It is in the file at once."""
        self.records.write(Event(wall_time=time.time(), **content).SerializeToString())
        self.records.flush()

    def close(self) -> None:
        """Close the file, and remove it if nothing could be written to it."""
        with suppress(OSError):
            self.records.close()
        with suppress(OSError):
            if self.path.stat().st_size == 0:
                self.path.unlink()


class CurveWriter:
    """The curves of a run, which go on when there is room for them again.

    Args:
        folder: of TensorBoard's files.
        first_step: steps done before; what an interrupted run has logged after them is to be forgotten.
    """

    def __init__(self, folder: Path, first_step: int):
        self.folder, self.first_step = folder, first_step
        self.file: EventFile | None = None
        self.has_failed = False

    def write(self, values: dict[str, float], step: int) -> str:
        """Write a point of each curve.

        Returns:
            what went wrong, in a line; empty where nothing did, or where it has been said of the point before.
        """
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        try:
            if self.file is None:
                self.file = EventFile(self.folder)
                self.file.add(file_version="brain.Event:2")
                self.file.add(step=self.first_step + 1, session_log=SessionLog(status=SessionLog.START))
            self.file.add(step=step, summary=Summary(value=points))
        except OSError as error:
            self.close()  # its last event may be half there: another file has the next one
            is_new, self.has_failed = not self.has_failed, True
            advice = "make room; " if is_without_room(error) else ""
            message = f"{self.folder}: curves cannot be written: {error.strerror or error}; {advice}"
            return f"{message}training goes on, and its curves when they can" if is_new else ""
        self.first_step, self.has_failed = step, False
        return ""

    def close(self) -> None:
        """Close the file; all that was written is in it already."""
        if self.file is not None:
            self.file.close()
            self.file = None


class Progress:
    """Adds up the terms of the steps and, every `logging_steps`, shows their means and writes them to TensorBoard.

    Sums stay on the device until then: reading a number waits for the accelerator.

    Args:
        accelerator: shows and writes on its main process only.
        total_steps: where the bar ends.
        first_step: steps done before, in a resumed run.
        curves: where the means are written.
    """

    def __init__(self, accelerator: Accelerator, total_steps: int, first_step: int, curves: CurveWriter):
        self.accelerator, self.curves = accelerator, curves
        self.bar = progress_bar(
            total=total_steps,
            initial=first_step,
            desc="training",
            unit="step",
            delay=0,
            dynamic_ncols=True,
            # No drawn bar: at 120 columns the numbers would be cut off.
            bar_format="{desc} {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )
        self._start_window()

    def _start_window(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.tokens = 0
        self.started = time.perf_counter()

    def add(self, terms: dict[str, Term], tokens: int) -> None:
        """Add the terms of one micro-batch and the number of its real tokens."""
        for name, term in terms.items():
            value = torch.as_tensor(term.sum).detach().double()
            weight = torch.as_tensor(term.weight, device=value.device).double()
            self.sums[name] = self.sums.get(name, 0) + value
            self.weights[name] = self.weights.get(name, 0) + weight
        self.tokens += tokens

    def step(self) -> None:
        """One optimizer step is done."""
        self.bar.update()

    def log(self, step: int, learning_rate: float, gradient_norm: float) -> None:
        """Write the means since the last call, over all ranks, and show them with the next step."""
        names = list(self.sums)
        seconds = time.perf_counter() - self.started
        rows = [[self.sums[name], self.weights[name]] for name in names] + [[self.tokens, 0]]
        own = torch.tensor(rows, dtype=torch.float32, device=self.accelerator.device)
        *means, (tokens, _) = self.accelerator.reduce(own, "sum").tolist()
        values = {name: total / max(weight, 1) for name, (total, weight) in zip(names, means, strict=True)}
        losses = {f"{name}_loss": values.pop(name) for name in ("mlm", "sop", "ict", "reading") if name in values}
        losses["aux_loss"] = values.pop("aux", 0.0)
        scalars = {
            "loss": sum(losses.values()),
            **losses,
            "lr": learning_rate,
            "grad_norm": gradient_norm,
            "tokens_per_second": tokens / seconds,
            **values,
        }
        self.record({f"train/{name}": value for name, value in scalars.items()}, step)
        shown = {
            name.removesuffix("_loss"): f"{value:.3f}" for name, value in losses.items() if value or name != "aux_loss"
        }
        if len(shown) == 1:  # the loss itself
            shown = {}
        experts = [f"{value:.0%}" for name, value in values.items() if name.startswith("expert_")]
        if experts:
            shown |= {"experts": "/".join(experts), "dropped": f"{values['dropped_share']:.0%}"}
        self.bar.set_postfix(
            {
                "loss": f"{scalars['loss']:.3f}",
                **shown,
                "lr": f"{learning_rate:.1e}",
                "norm": f"{gradient_norm:.2f}",
                "tokens/s": f"{scalars['tokens_per_second']:,.0f}",
            },
            refresh=False,  # `step` shows it
        )
        self._start_window()

    def record(self, values: dict[str, float], step: int) -> None:
        """Write a point of each curve."""
        if self.accelerator.is_main_process and (failure := self.curves.write(values, step)):
            self.write(failure)

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        if self.accelerator.is_main_process:
            self.bar.write(line)

    def pause(self) -> None:
        """Leave evaluation and saving out of the speed of the next window."""
        self.tokens, self.started = 0, time.perf_counter()

    def close(self) -> None:
        """End the bar."""
        self.bar.close()
