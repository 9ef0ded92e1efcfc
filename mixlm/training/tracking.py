"""The progress bar and the curves of a run: the same numbers in both."""

import time

import torch
from accelerate import Accelerator
from torch import Tensor

from ..progress import progress_bar
from .objectives import Term


class Progress:
    """Adds up the terms of the steps and, every `logging_steps`, shows their means and writes them to TensorBoard.

    Sums stay on the device until then: reading a number waits for the accelerator.

    Args:
        accelerator: shows and writes on its main process only.
        total_steps: where the bar ends.
        first_step: steps done before, in a resumed run.
    """

    def __init__(self, accelerator: Accelerator, total_steps: int, first_step: int):
        self.accelerator = accelerator
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
        self.accelerator.log({f"train/{name}": value for name, value in scalars.items()}, step=step)
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
