"""What the package lacked when a study tried it. What has won belongs to the package, and what is here asks for it.

A run names its candidates (`"candidates": ["muon"]`): of `NEW_MODELS`, which are given the new model, and of
`TRAININGS`, in whose context the model is trained.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from mixlm.heads import IGNORE
from mixlm.modeling_mixlm import ResidualAttention
from mixlm.training import loop
from mixlm.training.objectives import Batch, SentenceOrderObjective, Step, Term
from mixlm.training.optimization import Muon, OptimizerSettings, embedding_tables_of
from run_pretraining import OBJECTIVES

# -- new models ------------------------------------------------------------------------------------------------------


def initialize_by_fan_in(model: nn.Module, token_log_probabilities: Tensor) -> None:
    """Weights of the layers with a deviation of 1 / sqrt(inputs) instead of 0.02 (LeCun et al., 1998)."""
    for module in model.base_model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))


def scale_branches_down(model: nn.Module, token_log_probabilities: Tensor) -> None:
    """What closes a residual branch of mixlm's layers begins smaller by sqrt(2 layers) (GPT-2, section 2.3)."""
    factor = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    with torch.no_grad():
        for name, weight in model.base_model.named_parameters():
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


def normalize_before_branches(model: nn.Module, token_log_probabilities: Tensor) -> None:
    """x + f(LayerNorm(x)) where a peer has LayerNorm(x + f(x)), and a last LayerNorm (arXiv:2002.04745, section 3).

    For layers that are built as BERT's, among them those of ConvBERT and ELECTRA, and for ALBERT's.
    """
    encoder = model.base_model.encoder
    if model.config.model_type == "albert":
        for layer in (layer for group in encoder.albert_layer_groups for layer in group.albert_layers):
            attention = layer.attention
            move_norm(attention, "LayerNorm", before=[attention.query, attention.key, attention.value])
            move_norm(layer, "full_layer_layer_norm", before=[layer.ffn])
    else:
        for layer in encoder.layer:
            move_norm(layer.attention.output, "LayerNorm", before=[layer.attention.self])
            move_norm(layer.output, "LayerNorm", before=[layer.intermediate])
    encoder.last_norm = nn.LayerNorm(model.config.hidden_size, eps=model.config.layer_norm_eps)
    encoder.register_forward_hook(
        lambda module, inputs, outputs: replace(outputs, last_hidden_state=module.last_norm(outputs.last_hidden_state))
    )


def move_norm(owner: nn.Module, name: str, before: list[nn.Module]) -> None:
    """What `owner` normalizes by `name` stays as it is, and what goes into the modules is normalized instead."""
    norm = getattr(owner, name)
    setattr(owner, name, nn.Identity())
    before[0].norm = norm  # a module's parameters are those of its parts
    for module in before:
        module.register_forward_pre_hook(lambda module, inputs: (norm(inputs[0]), *inputs[1:]))


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


def with_options(**options: Any) -> AbstractContextManager:
    """Train with other options of the optimizer."""
    own = OptimizerSettings.options.fget
    return patch.object(OptimizerSettings, "options", property(lambda settings: {**own(settings), **options}))


class AdamWWithRates(Muon):
    """`Muon` (without matrices: AdamW) whose groups have `relative_rate` times the rate, and so times the decay."""

    def step(self, closure: None = None) -> None:
        """As in `Muon`."""
        for group in self.param_groups:
            group["lr"] *= group["relative_rate"]  # of the rate that the engine sets anew before each step
        super().step()


def with_embedding_rate(relative_rate: float) -> AbstractContextManager:
    """Train the tables of embeddings, and with them the vocabulary's scores, at another rate than the rest."""
    own = OptimizerSettings.groups

    def groups(settings: OptimizerSettings, model: nn.Module) -> list[dict[str, Any]]:
        tables = embedding_tables_of(model)
        decayed, *others = own(settings, model)
        parts = [
            {**decayed, "params": [each for each in decayed["params"] if each not in tables]},
            *others,
            {
                **decayed,
                "params": [each for each in decayed["params"] if each in tables],
                "relative_rate": relative_rate,
            },
        ]
        return [{"relative_rate": 1.0, **part} for part in parts]

    return patch.multiple(OptimizerSettings, groups=groups, optimizer_class=AdamWWithRates)


NEW_MODELS: dict[str, Callable[[nn.Module, Tensor], None]] = {
    "fan-in": initialize_by_fan_in,
    "scaled branches": scale_branches_down,
    "token frequencies": begin_at_token_frequencies,
    "scores in upper half": carry_scores_in_upper_half,
    "LayerNorm before branches": normalize_before_branches,
}
TRAININGS: dict[str, Callable[[], AbstractContextManager]] = {
    "cosine": partial(patch.object, loop, "learning_rate_factor", cosine),
    # As `"arguments": {"muon": true}`, which was not there yet when the lines that ask for it in this way were made.
    "muon": partial(patch.object, OptimizerSettings, "muon", True),
    "beta2 0.98": partial(with_options, betas=(0.9, 0.98)),
    "embedding rate x 3": partial(with_embedding_rate, 3.0),
    "embedding rate x 10": partial(with_embedding_rate, 10.0),
    "masked tokens alone": partial(patch.dict, OBJECTIVES, {"SOP": MaskedTokensObjective}),
}
