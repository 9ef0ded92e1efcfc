"""The Switch encoder: the MixLM skeleton with ordinary multi-head attention and a top-1 mixture of experts.

Letters of the shapes in this file: batch B, length L, hidden size C, heads, experts E (`n_experts`), expert width F.

A sequence is the routing group (GShard, arXiv:2006.16668, 3.2, splits a batch into groups in the same way): capacity
and the load-balancing loss are counted per sequence. So a sequence's result and gradient never depend on what else is
in the batch, and any split of a batch into micro-batches or ranks gives the same gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration import MixLMSwitchConfig
from .heads import (
    EncoderOutput,
    MaskedLMHeads,
    PreTrainingHeads,
    QuestionAnsweringHeads,
    RetrievalHeads,
    at_least_float32,
)
from .kernels import Dropout, Kernels, expert_feed_forward, is_bare
from .modeling_mixlm import Embeddings, EncoderStack, MixLMPreTrainedModel, ResidualAttention


class SwitchAttention(ResidualAttention):
    """Multi-head attention whose raw scores are carried to the next layer."""

    def __init__(self, config: MixLMSwitchConfig):
        super().__init__(config)
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden: Tensor,
        previous_scores: Tensor | None,
        token_mask: Tensor | None,
        attention_mask: Tensor | None,
        kernels: Kernels,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[B, L, C] -> attended [B, L, C], probabilities [B, heads, L, L], raw scores [B, heads, L, L]."""
        heads = (self.config.num_heads, -1)
        queries = self.query(hidden).unflatten(-1, heads)
        keys = self.key(hidden).unflatten(-1, heads)
        values = self.value(hidden).unflatten(-1, heads)
        return self.attend(queries, keys, values, previous_scores, attention_mask, kernels, **kwargs)


class Experts(nn.Module):
    """The feed-forward networks of all experts, their parameters stacked: up to width F, activation, back to C."""

    def __init__(self, config: MixLMSwitchConfig):
        super().__init__()
        experts, hidden, width = config.n_experts, config.hidden_size, config.ff_dim
        self.up_weight = nn.Parameter(torch.empty(experts, width, hidden))
        self.up_bias = nn.Parameter(torch.empty(experts, width))
        self.down_weight = nn.Parameter(torch.empty(experts, hidden, width))
        self.down_bias = nn.Parameter(torch.empty(experts, hidden))
        self.activation, self.act_fn = config.act_fn, ACT2FN[config.act_fn]
        self.act_class = type(self.act_fn)

    def forward(self, tokens: Tensor, counts: list[int], kernels: Kernels) -> Tensor:
        """[T, C] -> [T, C]: the first counts[0] tokens through expert 0, the next counts[1] through expert 1, ...

        An expert without tokens gets a zero gradient.
        """
        if kernels.fused and len(tokens) and is_bare(self, Experts) and is_bare(self.act_fn, self.act_class):
            return expert_feed_forward(
                *(tokens, counts, self.up_weight, self.up_bias, self.down_weight, self.down_bias),
                activation=self.activation,
                recompute=kernels.recompute,
            )
        # unbind, not indexing: W[e] would make a full-size gradient of the stack for each expert.
        parameters = zip(
            self.up_weight.unbind(),
            self.up_bias.unbind(),
            self.down_weight.unbind(),
            self.down_bias.unbind(),
            strict=True,
        )
        outputs = [
            F.linear(self.act_fn(F.linear(chunk, up_weight, up_bias)), down_weight, down_bias)
            for chunk, (up_weight, up_bias, down_weight, down_bias) in zip(
                tokens.split(counts), parameters, strict=True
            )
        ]
        return torch.cat(outputs)

    def one_by_one(self, tokens: Tensor, expert: Tensor) -> Tensor:
        """[T, C] and the expert of each [T] -> [T, C]: as `forward`, for a graph. How many tokens an expert has, the
        graph finds out each time; a number would be a constant in it. What has no expert becomes zeros."""
        transformed = torch.zeros_like(tokens)
        for number in range(len(self.up_weight)):
            (places,) = (expert == number).nonzero(as_tuple=True)
            active = self.act_fn(F.linear(tokens[places], self.up_weight[number], self.up_bias[number]))
            outputs = F.linear(active, self.down_weight[number], self.down_bias[number])
            transformed = transformed.index_copy(0, places, outputs.to(tokens.dtype))
        return transformed


class Router(nn.Linear):
    """The logits of the experts: [B, L, C] -> [B, L, E], in float32 at least.

    Selective precision (Switch Transformer, 2.4): which expert is first must not depend on rounding to 16 bits.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(*map(at_least_float32, (hidden, self.weight, self.bias)))


def within_capacity(expert: Tensor, real: Tensor, n_experts: int, capacity_factor: float) -> Tensor:
    """The tokens that fit: in each sequence an expert takes its first ceil(capacity_factor x tokens / E) tokens.

    `expert` is [B, L], `real` the bool mask of real tokens [B, L]; returns bool [B, L].
    """
    taken = F.one_hot(expert, n_experts) * real[..., None]  # [B, L, E]
    place_in_queue = (taken.cumsum(dim=1) * taken).sum(dim=-1)  # 1, 2, ... for real tokens
    # 1.2 x 25 / 5 is 6, but 6.0000002 in floating point: a rounding error must not admit one more token.
    capacity = (real.sum(dim=1, keepdim=True).float() * (capacity_factor * (1 - 1e-6)) / n_experts).ceil()
    return real & (place_in_queue <= capacity)


def router_loss(router_logits: Tensor, real: Tensor, balance_coef: float, z_coef: float) -> Tensor:
    """The auxiliary loss of one layer, a scalar: the mean over sequences of

    balance_coef x E x sum over experts of f_e P_e  (f_e: share of the sequence's tokens whose first choice is e;
    P_e: mean router probability of e; Switch Transformer, eq. 4-6)
    + z_coef x mean of logsumexp(logits)²  (ST-MoE, arXiv:2202.08906, eq. 5).

    `router_logits` is [B, L, E], `real` the mask of real tokens [B, L].
    """
    logits, weight = router_logits, real.bool().to(router_logits.dtype)
    weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1)  # [B, L], sums to 1 in each sequence
    chosen = F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits.dtype)
    # Sums and no matrix products, which autocast would round to 16 bits.
    share = (weight[..., None] * chosen).sum(dim=1)  # [B, E]
    probability = (weight[..., None] * logits.softmax(dim=-1)).sum(dim=1)
    balance = logits.shape[-1] * (share * probability).sum(dim=-1)
    z = (weight * logits.logsumexp(dim=-1).square()).sum(dim=1)
    return (balance_coef * balance + z_coef * z).mean()


def routing_counts(
    router_logits: tuple[Tensor, ...], attention_mask: Tensor, capacity_factor: float
) -> tuple[Tensor, Tensor]:
    """What the routers of all layers did with the real tokens of a training batch.

    `router_logits` are [B, L, E] a layer, `attention_mask` [B, L]. Returns the tokens whose first choice is each
    expert [E] and the number of tokens over capacity, both summed over layers.
    """
    real = attention_mask.bool()
    n_experts = router_logits[0].shape[-1]
    chosen, dropped = 0, 0
    for logits in router_logits:
        expert = logits.argmax(dim=-1)
        chosen = chosen + expert[real].bincount(minlength=n_experts)
        dropped = dropped + (real & ~within_capacity(expert, real, n_experts, capacity_factor)).sum()
    return chosen, dropped


class SwitchFeedForward(nn.Module):
    """Each token through the one expert its router prefers (Switch Transformer, arXiv:2101.03961, 2.1)."""

    def __init__(self, config: MixLMSwitchConfig):
        super().__init__()
        self.config = config
        self.router = Router(config.hidden_size, config.n_experts)
        self.experts = Experts(config)
        self.dropout = Dropout(config.dropout_prob)

    def forward(self, hidden: Tensor, token_mask: Tensor | None, kernels: Kernels) -> tuple[Tensor, Tensor]:
        """[B, L, C] -> transformed tokens [B, L, C], router logits [B, L, E].

        Padding is never routed. While training, tokens over their expert's capacity are not routed either; both get
        zeros here, so that the residual alone carries them on.
        """
        router_logits = self.router(hidden)
        probabilities = router_logits.softmax(dim=-1)
        probability, expert = probabilities.max(dim=-1)
        routed = torch.ones_like(expert, dtype=torch.bool) if token_mask is None else token_mask[..., 0].bool()
        if self.training:
            routed = within_capacity(expert, routed, self.config.n_experts, self.config.capacity_factor)
        if self.config.router_scaling == "straight-through":
            probability = probability / probability.detach()
        tokens, expert, probability = hidden.flatten(0, 1), expert.flatten(), probability.flatten()
        expert = expert.masked_fill(~routed.flatten(), self.config.n_experts)  # behind all experts
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            transformed = self.experts.one_by_one(tokens, expert) * probability[:, None].to(hidden.dtype)
        else:
            counts = expert.bincount(minlength=self.config.n_experts + 1)[:-1].tolist()
            places = expert.argsort(stable=True)[: sum(counts)]
            outputs = self.experts(tokens[places], counts, kernels) * probability[places, None].to(hidden.dtype)
            transformed = torch.zeros_like(tokens).index_copy(0, places, outputs.to(hidden.dtype))
        return self.dropout(transformed.view_as(hidden)), router_logits


class MixLMSwitchPreTrainedModel(MixLMPreTrainedModel):
    """Initialisation, loading and saving of every Switch model."""

    config: MixLMSwitchConfig
    auto_classes = {
        "AutoConfig": "configuration.MixLMSwitchConfig",
        "AutoModel": "modeling_switch.MixLMSwitchModel",
        "AutoModelForPreTraining": "modeling_switch.MixLMSwitchForPreTraining",
        "AutoModelForMaskedLM": "modeling_switch.MixLMSwitchForMaskedLM",
        "AutoModelForQuestionAnswering": "modeling_switch.MixLMSwitchForQuestionAnswering",
        "AutoModelForTextEncoding": "modeling_switch.MixLMSwitchForRetrieval",
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts):
            init.normal_(module.up_weight, std=self.config.initializer_range)
            init.normal_(module.down_weight, std=self.config.initializer_range)
            init.zeros_(module.up_bias)
            init.zeros_(module.down_bias)


class MixLMSwitchModel(MixLMSwitchPreTrainedModel):
    """The bare encoder."""

    def __init__(self, config: MixLMSwitchConfig):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.stack = EncoderStack(config, SwitchAttention, SwitchFeedForward)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EncoderOutput:
        """Encode a batch. Inputs and errors as in `MixLMModel.forward`.

        Args:
            output_router_logits: return router_logits, [batch, length, experts] of each layer; default: the
                configuration's.

        Returns:
            `EncoderOutput` with last_hidden_state [batch, length, hidden]; in training mode, and with
            `output_router_logits`, also aux_loss, the weighted load-balancing and z losses summed over the layers.
            (It is a number of the whole batch, which is nothing that a pipeline could cut into texts, and a loss that
            is measured is that of the task.) Attentions are [batch, heads, length, length].
        """
        hidden, router_logits = self._encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs
        )
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        aux_loss = None
        if self.training or output_router_logits:
            real = hidden.new_ones(hidden.shape[:2]) if attention_mask is None else attention_mask
            coefs = self.config.router_aux_loss_coef, self.config.router_z_loss_coef
            aux_loss = torch.stack([router_loss(logits, real, *coefs) for logits in router_logits]).sum()
        return EncoderOutput(
            last_hidden_state=hidden,
            aux_loss=aux_loss,
            router_logits=router_logits if output_router_logits else None,
        )


class MixLMSwitchForPreTraining(PreTrainingHeads, MixLMSwitchPreTrainedModel):
    """MLM and SOP, or MLM and ICT, by `config.pretraining_objective`."""

    base_model_class = MixLMSwitchModel


class MixLMSwitchForMaskedLM(MaskedLMHeads, MixLMSwitchPreTrainedModel):
    """The MLM head alone: fills masks."""

    base_model_class = MixLMSwitchModel


class MixLMSwitchForQuestionAnswering(QuestionAnsweringHeads, MixLMSwitchPreTrainedModel):
    """Start and end of an answer in a text."""

    base_model_class = MixLMSwitchModel


class MixLMSwitchForRetrieval(RetrievalHeads, MixLMSwitchPreTrainedModel):
    """One vector a text; with contexts, the in-batch retrieval loss."""

    base_model_class = MixLMSwitchModel


__all__ = [
    "MixLMSwitchPreTrainedModel",
    "MixLMSwitchModel",
    "MixLMSwitchForPreTraining",
    "MixLMSwitchForMaskedLM",
    "MixLMSwitchForQuestionAnswering",
    "MixLMSwitchForRetrieval",
]
