"""AdamW's parameter groups and the learning rate of a step."""

import torch
from torch import nn


def build_optimizer(model: nn.Module, learning_rate: float, weight_decay: float, epsilon: float) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) over all parameters; biases and LayerNorms do not decay."""
    decayed, free = [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_free = isinstance(module, nn.LayerNorm) or name.endswith("bias")
            (free if is_free else decayed).append(parameter)
    # A tied parameter occurs once in each module that uses it.
    groups = [
        {"params": list(dict.fromkeys(decayed)), "weight_decay": weight_decay},
        {"params": list(dict.fromkeys(free)), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, eps=epsilon, fused=True)


def learning_rate_factor(step: int, warmup_steps: int, scheduler_num_steps: int) -> float:
    """Linear warm-up, then linear decay: the share of the peak rate with which step `step` (from 0) is made.

    Rises to 1 at `warmup_steps` and would reach 0 at `scheduler_num_steps`. A pure function of the step, so there is
    no scheduler state to save.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return max(0.0, (scheduler_num_steps - step) / max(scheduler_num_steps - warmup_steps, 1))
