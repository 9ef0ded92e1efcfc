"""AdamW's parameter groups and the learning rate of a step."""

from typing import Any, NamedTuple

import torch
from torch import nn


class AdamW(NamedTuple):
    """The settings of AdamW (arXiv:1711.05101), with which an engine makes the optimizer over its own parameters."""

    learning_rate: float
    weight_decay: float
    epsilon: float

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """All parameters of the model in two groups: biases and LayerNorms do not decay."""
        decayed, free = [], []
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                is_free = isinstance(module, nn.LayerNorm) or name.endswith("bias")
                (free if is_free else decayed).append(parameter)
        # A tied parameter occurs once in each module that uses it.
        return [
            {"params": list(dict.fromkeys(decayed)), "weight_decay": self.weight_decay},
            {"params": list(dict.fromkeys(free)), "weight_decay": 0.0},
        ]

    @property
    def options(self) -> dict[str, Any]:
        """What torch.optim.AdamW takes beside the groups."""
        return {"lr": self.learning_rate, "eps": self.epsilon, "fused": True}

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """The optimizer of a model that is whole on every rank, or whose parameters know how they are sharded."""
        return torch.optim.AdamW(self.groups(model), **self.options)


def learning_rate_factor(step: int, warmup_steps: int, scheduler_num_steps: int, decay_ratio: float = 1.0) -> float:
    """Linear warm-up, the peak rate, linear decay: the share of the peak with which step `step` (from 0) is made.

    Rises to 1 at `warmup_steps`, stays there, and falls over the last `decay_ratio` of the schedule; it would reach 0
    at `scheduler_num_steps`. With a ratio of 1 it falls from the warm-up on. (Warm-up, stable, decay: MiniCPM,
    arXiv:2404.06395, section 4.) A pure function of the step, so there is no scheduler state to save.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    decay_steps = min(round(decay_ratio * scheduler_num_steps), scheduler_num_steps - warmup_steps)
    return min(1.0, max(0.0, (scheduler_num_steps - step) / max(decay_steps, 1)))
