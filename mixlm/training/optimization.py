"""AdamW and Muon: which parameters each of them updates and how, and the learning rate of a step."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Newton-Schulz iteration to the nearest orthogonal matrix (K. Jordan, "Muon", 2024): coefficients of
# a X + b X Xᵀ X + c (X Xᵀ)² X, which brings all but the smallest singular values near 1 in few rounds.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_ROUNDS = 5
MUON_MOMENTUM = 0.95
# Entries of an orthogonal matrix times this and the root of its longer side are as large as AdamW's updates are.
ADAMW_UPDATE = 0.2


class OptimizerSettings(NamedTuple):
    """With which an engine makes the optimizer over its own parameters.

    Args:
        learning_rate: of the first step; the loop sets that of the others.
        weight_decay: share of a weight that goes with a step, times the learning rate (arXiv:1711.05101).
        epsilon: of AdamW.
        muon: update the matrices of the encoder by `Muon`, and by AdamW only the rest.
    """

    learning_rate: float
    weight_decay: float
    epsilon: float
    muon: bool = False

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """All parameters of the model, once each.

        The first two groups are AdamW's: what decays, and biases and LayerNorms, which do not. Muon has a group for
        each shape that its parameters have as `matrices`.
        """
        matrices = matrices_of(model) if self.muon else {}
        decayed, free = [], []
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                is_free = isinstance(module, nn.LayerNorm) or name.endswith("bias")
                (free if is_free else decayed).append(parameter)
        # A tied parameter occurs once in each module that uses it.
        groups = [
            {"params": [each for each in dict.fromkeys(decayed) if each not in matrices]},
            {"params": list(dict.fromkeys(free)), "weight_decay": 0.0},
        ]
        for shape in dict.fromkeys(matrices.values()):
            groups.append({"params": [each for each in matrices if matrices[each] == shape], "matrices": shape})
        return [{"weight_decay": self.weight_decay, **group} for group in groups]

    @property
    def optimizer_class(self) -> type[torch.optim.AdamW]:
        """What takes the groups and the options."""
        return Muon if self.muon else torch.optim.AdamW

    @property
    def options(self) -> dict[str, Any]:
        """What the optimizer takes beside the groups."""
        return {"lr": self.learning_rate, "eps": self.epsilon, "fused": True}

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """The optimizer of a model that is whole on every rank."""
        return self.optimizer_class(self.groups(model), **self.options)


def embedding_tables_of(model: nn.Module) -> set[nn.Parameter]:
    """The weights of all embeddings: a row for each token, position or type."""
    return {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}


def matrices_of(model: nn.Module) -> dict[nn.Parameter, tuple[int, int, int]]:
    """What Muon updates: the weights of the encoders' layers, and their shape as matrices, (how many, rows, columns).

    A linear layer is one matrix, a convolution one for each of its groups, and stacked experts one each. Embeddings
    and heads are not among them: their rows are tokens and classes, each for itself.
    """
    tables = embedding_tables_of(model)
    towers = [model.base_model, getattr(model, "context_encoder", None)]  # a retriever can have two
    matrices = {}
    for module in (module for tower in towers if tower is not None for module in tower.modules()):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or name.endswith("bias") or parameter in tables:
                continue
            rows, columns = parameter.shape[-2:]
            if isinstance(module, nn.Conv1d):
                rows, columns = parameter.shape[0] // module.groups, parameter.shape[1:].numel()
            matrices[parameter] = (parameter.numel() // (rows * columns), rows, columns)
    return matrices


class Muon(torch.optim.AdamW):
    """Muon for the groups that have `matrices`, AdamW for the others.

    An update is the orthogonalized momentum (Nesterov's), scaled to the size of AdamW's updates, so that learning rate
    and weight decay mean the same (Liu et al. 2025, arXiv:2502.16982, section 2.2). A matrix needs one moment instead
    of two; it has AdamW's name for it, which it is: a moving average of the gradient. An update is as large however
    small the momentum: an expert that gets no tokens any more goes on moving, where AdamW would leave it.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the parameters that have a gradient."""
        groups = self.param_groups
        for group in groups:
            if "matrices" in group:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, group)
        try:
            self.param_groups = [group for group in groups if "matrices" not in group]
            super().step()
        finally:
            self.param_groups = groups

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
        state["step"] += 1
        state["exp_avg"].lerp_(parameter.grad, 1 - MUON_MOMENTUM)
        momentum = torch.lerp(parameter.grad, state["exp_avg"], MUON_MOMENTUM)
        scale = ADAMW_UPDATE * math.sqrt(max(group["matrices"][1:]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(self._orthogonalized(momentum, group["matrices"]), alpha=group["lr"] * scale)

    def _orthogonalized(self, momentum: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """In its own shape, what is orthogonalized as matrices of `shape`."""
        # X Xᵀ squares what rounding has done: in bfloat16 the iteration would not converge.
        exact = momentum.to(torch.promote_types(momentum.dtype, torch.float32))
        return orthogonalized(exact.reshape(shape)).reshape(momentum.shape).to(momentum.dtype)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Each of [..., rows, columns] with all singular values near 1.

    X becomes p(X Xᵀ) X in every round, so that X Xᵀ can go through the rounds alone: it has the length of the shorter
    side only. That nearly halves the work where one side is four times as long; a square costs a quarter more.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if is_tall else matrices
    wide = wide / (torch.linalg.matrix_norm(wide, keepdim=True) + 1e-7)
    gram = wide @ wide.mT
    product = factor = _newton_schulz(gram)
    for _ in range(NEWTON_SCHULZ_ROUNDS - 1):
        gram = factor @ gram @ factor
        factor = _newton_schulz(gram)
        product = factor @ product
    wide = product @ wide
    return wide.mT if is_tall else wide


def _newton_schulz(gram: Tensor) -> Tensor:
    """a + b G + c G², by which a round multiplies X."""
    a, b, c = NEWTON_SCHULZ
    factor = b * gram + c * gram @ gram
    factor.diagonal(dim1=-2, dim2=-1).add_(a)
    return factor


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
