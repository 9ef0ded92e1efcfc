"""The number formats of a training run, and the scale that keeps fp16 gradients from vanishing."""

import math
from contextlib import AbstractContextManager
from typing import Any

import torch

PRECISIONS = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Where matrix products are computed in the 16 bits of `precision`; nothing changes for fp32."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


class LossScale:
    """What an fp16 loss is multiplied by, so that small gradients are above the smallest fp16 number.

    The scale is halved when a gradient overflows, and that step is skipped; it is doubled after `growth_interval`
    steps without. (Mixed precision training, arXiv:1710.03740, section 3.2.) The verdict is the global gradient norm
    alone, which is the same number on every rank, so that all of them skip together under every engine.

    Args:
        initial: the scale of the first step.
        growth_interval: steps without an overflow after which the scale is doubled.
    """

    def __init__(self, initial: float = 2.0**16, growth_interval: int = 2000):
        self.value, self.growth_interval = initial, growth_interval
        self.steps_since_change = 0
        self.skipped_in_a_row = 0

    def update(self, gradient_norm: float) -> bool:
        """Take note of a step's gradient norm; returns whether the step is to be made, rather than skipped."""
        if not math.isfinite(gradient_norm):
            self.value /= 2
            self.steps_since_change = 0
            self.skipped_in_a_row += 1
            return False
        self.skipped_in_a_row = 0
        self.steps_since_change += 1
        if self.steps_since_change == self.growth_interval:
            self.value *= 2
            self.steps_since_change = 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs of it."""
        return {
            "scale": self.value,
            "steps_since_change": self.steps_since_change,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of `state_dict`."""
        self.value = float(state["scale"])
        self.steps_since_change = int(state["steps_since_change"])
        self.skipped_in_a_row = int(state["skipped_in_a_row"])
