"""The MixLM encoder: mixed-kernel convolutions inside attention and feed-forward, residual attention, shared layers.

Letters of the shapes in this file: batch B, length L, hidden size C, slices E (`n_experts`), slice width D = C / E,
kernel groups G (`num_heads`), feed-forward width F. What is fast about it is in `kernels`.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.dynamic_module_utils import custom_object_save
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration import MixLMConfig
from .heads import EncoderOutput, MaskedLMHeads, PreTrainingHeads, QuestionAnsweringHeads, RetrievalHeads, initialize
from .kernels import (
    Dropout,
    Kernels,
    TokenConvolution,
    choose_kernels,
    is_bare,
    mixed_kernel_convolution,
    mixed_kernel_feed_forward,
    residual_attention,
    reversible_residual_attention,
)


def kernel_sizes(largest: int, groups: int) -> list[int]:
    """The kernel size of each of `groups` kernel groups, largest first, all odd.

    Odd sizes evenly spread from `largest` down to 3, repeated where there are more groups than sizes; one group has
    `largest` alone. With (largest - 1) / 2 groups every odd size occurs once: 9, 7, 5, 3. (Mixed depthwise
    convolutions: MixConv, arXiv:1907.09595; here along the tokens.)
    """
    available = list(range(largest, 2, -2)) or [largest]
    if groups == 1:
        return [largest]
    if groups >= len(available):  # each size equally often, as far as that is possible
        return [available[group * len(available) // groups] for group in range(groups)]
    return [available[round(group * (len(available) - 1) / (groups - 1))] for group in range(groups)]


class Embeddings(nn.Module):
    """Word + position + token type embeddings, LayerNorm, dropout: [B, L] -> [B, L, C]."""

    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.LN_eps)
        self.dropout = Dropout(config.dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        length, longest = words.shape[1], self.position_embeddings.num_embeddings
        if length == 0:
            raise ValueError("the input has no token; give every text one at least, such as [CLS]")
        if length > longest:
            raise ValueError(f"the input has {length} tokens, but max_position_embeddings is {longest}")
        if position_ids is None:
            position_ids = torch.arange(length, device=words.device)[None]
        if token_type_ids is None:
            token_type_ids = torch.zeros(words.shape[:2], dtype=torch.long, device=words.device)
        embedded = words + self.position_embeddings(position_ids) + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.norm(embedded))


class MixedKernelConvolution(nn.Module):
    """The parameters of `mixed_kernel_convolution`, C -> E x `channels_per_slice`: [B, L, C] -> [B, L, E, M]."""

    def __init__(self, config: MixLMConfig, channels_per_slice: int):
        super().__init__()
        self.slices = config.n_experts
        inputs, outputs = config.hidden_size // config.num_heads, channels_per_slice * self.slices // config.num_heads
        self.convolutions = nn.ModuleList(
            TokenConvolution(inputs, outputs, size, padding=size // 2, groups=self.slices)
            for size in kernel_sizes(config.kernel_size, config.num_heads)
        )

    def forward(self, hidden: Tensor, token_mask: Tensor | None) -> Tensor:
        if token_mask is not None:
            hidden = hidden * token_mask  # a kernel reaches over the end of a text: padding must be zero
        return mixed_kernel_convolution(hidden, self.convolutions, self.slices)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The plain form behind transformers' attention interface: tensors [B, maps, L, width], additive mask."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(dim=-1)
    attended = nn.functional.dropout(probabilities, dropout, module.training) @ value
    return attended.transpose(1, 2), probabilities


class ResidualAttention(nn.Module):
    """What the attention of both families shares: attend, join the maps, project back to the hidden size.

    A family's own attention says what queries, keys and values are.
    """

    is_causal = False  # read by the attentions of transformers, which would mask the future without it

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(config.dropout_prob)  # never called: the forms of attention take its rate

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        previous_scores: Tensor | None,
        attention_mask: Tensor | None,
        kernels: Kernels,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Attention over `queries`, `keys` and `values`, each [B, L, maps, width].

        Returns the attended tokens [B, L, C], the probabilities [B, maps, L, L] (None where the form of attention has
        none) and the raw scores to carry on (None without residual attention).
        """
        dropout = self.dropout.p if self.training else 0.0
        probabilities = scores = None
        if not self.config.residual_attention:
            interface = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            by_map = (tensor.transpose(1, 2) for tensor in (queries, keys, values))
            scaling = 1 / math.sqrt(queries.shape[-1])
            attended, probabilities = interface(
                self, *by_map, attention_mask, scaling=scaling, dropout=dropout, **kwargs
            )
        elif kernels.fused:
            attended, scores = reversible_residual_attention(
                queries, keys, values, previous_scores, attention_mask, dropout
            )
        else:
            attended, probabilities, scores = residual_attention(
                queries, keys, values, previous_scores, attention_mask, dropout
            )
        return self.o_proj(attended.flatten(2)), probabilities, scores


class MixLMAttention(ResidualAttention):
    """Attention of each slice H_e: softmax(H_e K_eᵀ / √D + carried scores) H_e, with K_e a convolution of H_e.

    There is no query or value projection: a slice looks for itself among keys that know their neighbourhood.
    """

    def __init__(self, config: MixLMConfig):
        super().__init__(config)
        self.key = MixedKernelConvolution(config, config.hidden_size // config.n_experts)

    def forward(
        self,
        hidden: Tensor,
        previous_scores: Tensor | None,
        token_mask: Tensor | None,
        attention_mask: Tensor | None,
        kernels: Kernels,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[B, L, C] -> attended [B, L, C], probabilities [B, E, L, L], raw scores [B, E, L, L]."""
        slices = hidden.unflatten(-1, (self.key.slices, -1))  # [B, L, E, D]
        keys = self.key(hidden, token_mask)  # [B, L, E, D]
        return self.attend(slices, keys, slices, previous_scores, attention_mask, kernels, **kwargs)


class MixLMFeedForward(nn.Module):
    """Mixed-kernel convolution to width F, activation, dense back to C, dropout: [B, L, C] -> [B, L, C]."""

    def __init__(self, config: MixLMConfig):
        super().__init__()
        self.convolution = MixedKernelConvolution(config, config.ff_dim // config.n_experts)
        self.activation = config.act_fn  # a configuration can be changed, for the next model
        self.act_fn = ACT2FN[self.activation]
        self.act_class = type(self.act_fn)
        self.dense = nn.Linear(config.ff_dim, config.hidden_size)
        self.dropout = Dropout(config.dropout_prob)

    def forward(self, hidden: Tensor, token_mask: Tensor | None, kernels: Kernels) -> tuple[Tensor, None]:
        """Returns the transformed tokens, and None where a mixture of experts has its router logits."""
        if kernels.fused and self._is_bare():
            transformed = mixed_kernel_feed_forward(
                hidden,
                token_mask,
                self.convolution.convolutions,
                self.dense,
                self.convolution.slices,
                self.activation,
                kernels.recompute,
            )
        else:
            transformed = self.dense(self.act_fn(self.convolution(hidden, token_mask).flatten(2)))
        return self.dropout(transformed), None

    def _is_bare(self) -> bool:
        """Whether the fused form, which reads the weights and calls no module, leaves nothing out."""
        return (
            is_bare(self.convolution, MixedKernelConvolution)
            and all(is_bare(convolution, TokenConvolution) for convolution in self.convolution.convolutions)
            and is_bare(self.act_fn, self.act_class)
            and is_bare(self.dense, nn.Linear)
        )


class EncoderLayer(GradientCheckpointingLayer):
    """The residual skeleton of one layer: x + f(LN(x)) (pre-LN) or LN(x + f(x)) (post-LN), for attention and
    feed-forward in turn.

    It owns the two LayerNorms only. Attention and feed-forward are handed in, because a layer group may share either
    with other layers while each layer keeps its own norms.
    """

    def __init__(self, config):
        super().__init__()
        self.pre_norm = config.ln_pos == 0
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.LN_eps)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.LN_eps)

    def forward(
        self,
        hidden: Tensor,
        scores: Tensor | None,
        token_mask: Tensor | None,
        attention_mask: Tensor | None,
        kernels: Kernels,
        attention: Callable,
        feed_forward: Callable,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[B, L, C] -> hidden [B, L, C], raw scores to carry on, router logits (None without experts)."""
        if self.pre_norm:
            attended, _, scores = attention(
                self.attention_norm(hidden), scores, token_mask, attention_mask, kernels, **kwargs
            )
            hidden = hidden + attended
            transformed, router_logits = feed_forward(self.feed_forward_norm(hidden), token_mask, kernels)
            hidden = hidden + transformed
        else:
            attended, _, scores = attention(hidden, scores, token_mask, attention_mask, kernels, **kwargs)
            hidden = self.attention_norm(hidden + attended)
            transformed, router_logits = feed_forward(hidden, token_mask, kernels)
            hidden = self.feed_forward_norm(hidden + transformed)
        return hidden, scores, router_logits


class EncoderStack(nn.Module):
    """The layers of an encoder. Consecutive layers of a group run the same module, as in ALBERT (arXiv:1909.11942).

    Sharing is by calling one module several times; no parameter is stored, saved or updated twice.
    """

    def __init__(self, config, attention_class: type[nn.Module], feed_forward_class: type[nn.Module]):
        super().__init__()
        self.num_layers, self.layer_group = config.num_hidden_layers, config.layer_group
        self.attention_class = attention_class
        self.shared = {
            "all": {"attention", "feed_forward", "norms"},
            "ffn": {"feed_forward"},
            "attention": {"attention"},
        }[config.shared_parameters]
        self.attentions = nn.ModuleList(attention_class(config) for _ in range(self._count("attention")))
        self.feed_forwards = nn.ModuleList(feed_forward_class(config) for _ in range(self._count("feed_forward")))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(self._count("norms")))
        self.final_norm = (
            nn.LayerNorm(config.hidden_size, eps=config.LN_eps) if config.final_layer_norm else nn.Identity()
        )

    def is_bare(self) -> bool:
        """Whether layers and attentions are what they were made as, with nothing around them that sees the scores."""
        return all(is_bare(layer, EncoderLayer) for layer in self.layers) and all(
            is_bare(attention, self.attention_class) for attention in self.attentions
        )

    def _count(self, part: str) -> int:
        return self.num_layers // self.layer_group if part in self.shared else self.num_layers

    def _module_of(self, part: str, modules: nn.ModuleList, layer: int) -> nn.Module:
        return modules[layer // self.layer_group if part in self.shared else layer]

    def forward(
        self,
        hidden: Tensor,
        token_mask: Tensor | None,
        attention_mask: Tensor | None,
        kernels: Kernels,
        **kwargs: Any,
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """[B, L, C] -> last hidden state [B, L, C], router logits of each layer (None without experts)."""
        scores, router_logits = None, []
        for index in range(self.num_layers):
            # Their calls, not the modules: what offloads a model (accelerate) moves every argument that can be moved.
            attention = self._module_of("attention", self.attentions, index).__call__
            feed_forward = self._module_of("feed_forward", self.feed_forwards, index).__call__
            hidden, scores, logits = self._module_of("norms", self.layers, index)(
                hidden,
                scores,
                token_mask,
                attention_mask,
                kernels,
                attention,
                feed_forward,
                **kwargs,
            )
            router_logits.append(logits)
        return self.final_norm(hidden), tuple(router_logits)


class MixLMPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving of every MixLM model; a saved folder carries the code of all heads."""

    config: MixLMConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EncoderStack"]  # its layers hand each other scores, and share parameters
    _supports_sdpa = True
    accepts_loss_kwargs = False  # for `Trainer`: a loss is the mean of its own batch, whatever else a step accumulates
    # A folder may hold the weights of several heads; a model takes its own and lets the others be.
    _keys_to_ignore_on_load_unexpected = [r"^(mlm_head|sop_head|pooler|qa_outputs|context_encoder)\."]
    _can_record_outputs = {"hidden_states": EncoderLayer, "attentions": OutputRecorder(ResidualAttention, index=1)}
    # Auto class -> class of this family. Written into every saved configuration, so that a process without this
    # package loads every head of the folder with trust_remote_code=True. AutoModelForTextEncoding is transformers'
    # name for models that turn a text into vectors.
    auto_classes = {
        "AutoConfig": "configuration.MixLMConfig",
        "AutoModel": "modeling_mixlm.MixLMModel",
        "AutoModelForPreTraining": "modeling_mixlm.MixLMForPreTraining",
        "AutoModelForMaskedLM": "modeling_mixlm.MixLMForMaskedLM",
        "AutoModelForQuestionAnswering": "modeling_mixlm.MixLMForQuestionAnswering",
        "AutoModelForTextEncoding": "modeling_mixlm.MixLMForRetrieval",
    }

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize(module)

    def __init__(self, config, *args: Any, **kwargs: Any):
        """Raises StrictDataclassError for a configuration that was changed to values which are not allowed."""
        config.validate()  # its constructor has done so, but `from_pretrained(folder, field=value)` comes after that
        super().__init__(config, *args, **kwargs)

    def save_pretrained(self, save_directory, *args: Any, **kwargs: Any):
        """As in transformers; the configuration also names the class of every head (`auto_map`)."""
        self.config.auto_map = dict(self.auto_classes)
        family = next(base for base in type(self).__mro__ if "auto_classes" in vars(base))
        if type(self).__module__ != family.__module__:  # the file of a head of somebody's own is not those it names
            os.makedirs(save_directory, exist_ok=True)
            custom_object_save(family, save_directory)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The base model's forward: embeddings and the stack. Returns hidden [B, L, C] and the router logits."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        token_mask = None
        if attention_mask is not None:
            if attention_mask.shape != hidden.shape[:2]:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}, expected {tuple(hidden.shape[:2])}: "
                    "one number a token, 0 for padding"
                )
            token_mask = attention_mask.bool().to(hidden.dtype)[..., None]  # [B, L, 1]
        if self.config.residual_attention:
            visible = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        else:
            visible = create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden, attention_mask=attention_mask
            )
        kernels = choose_kernels(self.config.kernels, hidden, plain_needed=self._needs_plain_kernels(kwargs))
        return self.stack(hidden, token_mask, visible, kernels, **kwargs)

    def _needs_plain_kernels(self, requested: dict[str, Any]) -> bool:
        """Whether somebody wants of this forward pass what the fused forms do not have: attention probabilities; the
        outputs of layers, at which a gradient may begin; scores that gradient checkpointing can run twice from, or
        that a wrapper around a layer or an attention (sharding, checkpointing, probing) can look at."""
        with_attentions = requested.get("output_attentions", self.config.output_attentions)
        with_layers = requested.get("output_hidden_states", self.config.output_hidden_states)
        checkpointing = self.training and any(layer.gradient_checkpointing for layer in self.stack.layers)
        is_wrapped = not self.stack.is_bare()
        return bool(with_attentions or with_layers or checkpointing or is_wrapped)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.base_model.embeddings.word_embeddings = value


class MixLMModel(MixLMPreTrainedModel):
    """The bare encoder."""

    def __init__(self, config: MixLMConfig):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.stack = EncoderStack(config, MixLMAttention, MixLMFeedForward)
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> EncoderOutput:
        """Encode a batch.

        Args:
            input_ids: [batch, length] token ids; or `inputs_embeds` [batch, length, hidden].
            attention_mask: [batch, length], 1 for real tokens and 0 for padding; default: no padding.
            token_type_ids: [batch, length]; default: all 0.
            position_ids: [batch, length] or [1, length]; default: 0, 1, 2, ...

        Returns:
            `EncoderOutput` with last_hidden_state [batch, length, hidden]; on request hidden_states (layers + 1 of the
            same shape) and attentions [batch, slices, length, length] of each layer.

        Raises:
            ValueError: no token, or more than max_position_embeddings; a mask of another shape; no input or two.
        """
        hidden, _ = self._encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        return EncoderOutput(last_hidden_state=hidden)


class MixLMForPreTraining(PreTrainingHeads, MixLMPreTrainedModel):
    """MLM and SOP, or MLM and ICT, by `config.pretraining_objective`."""

    base_model_class = MixLMModel


class MixLMForMaskedLM(MaskedLMHeads, MixLMPreTrainedModel):
    """The MLM head alone: fills masks."""

    base_model_class = MixLMModel


class MixLMForQuestionAnswering(QuestionAnsweringHeads, MixLMPreTrainedModel):
    """Start and end of an answer in a text."""

    base_model_class = MixLMModel


class MixLMForRetrieval(RetrievalHeads, MixLMPreTrainedModel):
    """One vector a text; with contexts, the in-batch retrieval loss."""

    base_model_class = MixLMModel


__all__ = [
    "MixLMPreTrainedModel",
    "MixLMModel",
    "MixLMForPreTraining",
    "MixLMForMaskedLM",
    "MixLMForQuestionAnswering",
    "MixLMForRetrieval",
]
