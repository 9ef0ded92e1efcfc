"""What the package lacks and a study tries: it is here until it has won, and then it belongs to the package.

A run names its candidates (`"candidates": ["muon"]`): of `NEW_MODELS`, which are given the new model, and of
`TRAININGS`, in whose context the model is trained.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from models import PeerForPreTraining
from torch import Tensor, nn

from mixlm.heads import IGNORE
from mixlm.modeling_mixlm import ResidualAttention
from mixlm.training import loop
from mixlm.training.objectives import Batch, SentenceOrderObjective, Step, Term
from mixlm.training.optimization import AdamW
from run_pretraining import OBJECTIVES

# Newton-Schulz iteration to the nearest orthogonal matrix, as in K. Jordan's "Muon" (2024): coefficients of
# a X + b X Xᵀ X + c (X Xᵀ)² X that bring every singular value near 1 in few rounds.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_ROUNDS = 5
MUON_MOMENTUM = 0.95


def body_of(model: nn.Module) -> nn.Module:
    """The encoder without its heads."""
    return model.masked_lm.base_model if isinstance(model, PeerForPreTraining) else model.base_model


# -- new models ------------------------------------------------------------------------------------------------------


def initialize_by_fan_in(model: nn.Module, token_log_probabilities: Tensor) -> None:
    """Weights of the layers with a deviation of 1 / sqrt(inputs) instead of 0.02 (LeCun et al., 1998)."""
    for module in body_of(model).modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))


def scale_branches_down(model: nn.Module, token_log_probabilities: Tensor) -> None:
    """What closes a residual branch of mixlm's layers begins smaller by sqrt(2 layers) (GPT-2, section 2.3)."""
    factor = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    with torch.no_grad():
        for name, weight in body_of(model).named_parameters():
            if name.endswith(("o_proj.weight", "dense.weight")):
                weight.mul_(factor)


def begin_at_token_frequencies(model: nn.Module, token_log_probabilities: Tensor) -> None:
    """The vocabulary's scores begin with how often each token occurs, and not with equal odds."""
    (bias,) = [parameter for parameter in model.parameters() if parameter.shape == token_log_probabilities.shape]
    with torch.no_grad():
        bias.copy_(token_log_probabilities)


def carry_scores_in_upper_half(model: nn.Module, token_log_probabilities: Tensor) -> None:
    """Residual attention scores are carried on from the middle of the layers only."""
    attentions = [module for module in model.modules() if isinstance(module, ResidualAttention)]
    for attention in attentions[: len(attentions) // 2]:
        attention.register_forward_hook(lambda module, inputs, outputs: (*outputs[:2], None))


# -- trainings -------------------------------------------------------------------------------------------------------


def cosine(step: int, warmup_steps: int, scheduler_num_steps: int, decay_ratio: float) -> float:
    """Linear warm-up, then half a cosine wave down to 0 (arXiv:1608.03983); else as `learning_rate_factor`."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup_steps) / max(scheduler_num_steps - warmup_steps, 1))


class MaskedTokensObjective(SentenceOrderObjective):
    """MLM alone: the order of the sentences is not learned."""

    def loss(self, batch: Batch, number: int, step: Step) -> tuple[Tensor, dict[str, Term]]:
        """As in `Objective.loss`."""
        no_order = torch.full_like(batch["sentence_order_label"], IGNORE)
        return super().loss({**batch, "sentence_order_label": no_order}, number, step)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Each of [..., rows, columns] with all singular values near 1."""
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    matrices = matrices.mT if is_tall else matrices
    matrices = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_ROUNDS):
        gram = matrices @ matrices.mT
        matrices = a * matrices + (b * gram + c * gram @ gram) @ matrices
    return matrices.mT if is_tall else matrices


class Muon(torch.optim.AdamW):
    """Muon for the matrices and convolutions of the layers, AdamW for the others.

    An update is the orthogonalized momentum, scaled to the size of AdamW's updates (arXiv:2502.16982, section 2.2), so
    that rate and decay mean the same. The state has AdamW's names, so that checkpoints can hold it.

    Args:
        groups: AdamW's; those with `groups_of` are Muon's, and have one parameter each: how many matrices a
            convolution of so many groups is made of.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the parameters that have a gradient."""
        all_groups = self.param_groups
        for group in all_groups:
            parameters = group["params"] if "groups_of" in group else []
            for parameter in parameters:
                if parameter.grad is not None:
                    self._update(parameter, group)
        try:
            self.param_groups = [group for group in all_groups if "groups_of" not in group]
            super().step()
        finally:
            self.param_groups = all_groups

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)  # not needed: what checkpoints expect
        state["step"] += 1
        momentum = state["exp_avg"].mul_(MUON_MOMENTUM).add_(parameter.grad)
        nesterov = parameter.grad + MUON_MOMENTUM * momentum
        matrices = nesterov.reshape(group["groups_of"], len(parameter) // group["groups_of"], -1)
        scale = 0.2 * math.sqrt(max(matrices.shape[-2:]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(orthogonalized(matrices).view_as(parameter), alpha=group["lr"] * scale)


def build_muon(settings: AdamW, model: nn.Module) -> torch.optim.Optimizer:
    """As `AdamW.build`; embeddings, the scores of the vocabulary and the heads stay AdamW's."""
    matrices = {
        module.weight: getattr(module, "groups", 1)
        for module in body_of(model).modules()
        if isinstance(module, (nn.Linear, nn.Conv1d))
    }
    groups = [
        {**group, "params": [parameter for parameter in group["params"] if parameter not in matrices]}
        for group in settings.groups(model)
    ]
    decayed = {"weight_decay": settings.weight_decay}
    of_muon = [{**decayed, "params": [weight], "groups_of": count} for weight, count in matrices.items()]
    return Muon([*groups, *of_muon], **settings.options)


def with_options(**options: Any) -> AbstractContextManager:
    """Train with other options of AdamW."""
    own = AdamW.options.fget
    return patch.object(AdamW, "options", property(lambda settings: {**own(settings), **options}))


NEW_MODELS: dict[str, Callable[[nn.Module, Tensor], None]] = {
    "fan-in": initialize_by_fan_in,
    "scaled branches": scale_branches_down,
    "token frequencies": begin_at_token_frequencies,
    "scores in upper half": carry_scores_in_upper_half,
}
TRAININGS: dict[str, Callable[[], AbstractContextManager]] = {
    "cosine": partial(patch.object, loop, "learning_rate_factor", cosine),
    "muon": partial(patch.object, AdamW, "build", build_muon),
    "beta2 0.98": partial(with_options, betas=(0.9, 0.98)),
    "masked tokens alone": partial(patch.dict, OBJECTIVES, {"SOP": MaskedTokensObjective}),
}
