"""MixLM as it was written before: the formulation that every speed-up is measured against.

The formulas are those of `mixlm.modeling_mixlm`, and the numbers too (tests/benchmarks/test_older.py). The cost is
of the older scripts: every kernel is stored as large as the largest and masked, every slice has a convolution and an
attention of its own in a Python loop, each layer keeps its own scores, and the MLM head predicts all positions.
torch's own layers are used wherever they fit (LayerNorm, GELU, softmax), because an older version that is slow for
other reasons would flatter the new one.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixlm import MixLMConfig, MixLMForPreTraining
from mixlm.heads import IGNORE, PreTrainingOutput
from mixlm.modeling_mixlm import kernel_sizes


class MaskedConvolution(nn.Module):
    """A grouped Conv1d of the largest kernel for one slice, [B, D, L] -> [B, M, L]; a 0/1 mask cuts the kernels."""

    def __init__(self, config: MixLMConfig, channels: int):
        super().__init__()
        width, groups, largest = config.hidden_size // config.n_experts, config.num_heads, config.kernel_size
        self.convolution = nn.Conv1d(width, channels, largest, padding=largest // 2, groups=groups)
        mask = torch.zeros_like(self.convolution.weight)
        for size, rows in zip(kernel_sizes(largest, groups), mask.chunk(groups), strict=True):
            rim = (largest - size) // 2
            rows[..., rim : largest - rim] = 1
        self.register_buffer("mask", mask)

    def forward(self, hidden: Tensor) -> Tensor:
        convolution = self.convolution
        return F.conv1d(
            hidden,
            convolution.weight * self.mask,
            convolution.bias,
            padding=convolution.padding,
            groups=convolution.groups,
        )

    @torch.no_grad()
    def copy_from(self, convolutions: nn.ModuleList, number: int) -> None:
        """Take the weights of slice `number` from the one convolution per kernel group of `mixlm`."""
        largest, groups = self.convolution.kernel_size[0], self.convolution.groups
        parts = zip(
            convolutions, self.convolution.weight.chunk(groups), self.convolution.bias.chunk(groups), strict=True
        )
        for stored, weight, bias in parts:
            rim = (largest - stored.kernel_size[0]) // 2
            mine = slice(number * len(weight), (number + 1) * len(weight))
            weight[..., rim : largest - rim] = stored.weight[mine]
            bias.copy_(stored.bias[mine])


class Attention(nn.Module):
    """Slice after slice: softmax(H K^T / sqrt(D) + the previous layer's scores) H."""

    def __init__(self, config: MixLMConfig):
        super().__init__()
        width = config.hidden_size // config.n_experts
        self.keys = nn.ModuleList(MaskedConvolution(config, width) for _ in range(config.n_experts))
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout_prob)

    def forward(
        self, hidden: Tensor, previous: list[Tensor] | None, token_mask: Tensor, score_mask: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        outputs, all_scores = [], []
        for number, (key, part) in enumerate(zip(self.keys, hidden.chunk(len(self.keys), dim=-1), strict=True)):
            scores = part @ key((part * token_mask).transpose(1, 2)) / math.sqrt(part.shape[-1])
            if previous is not None:
                scores = scores + previous[number]
            all_scores.append(scores)
            outputs.append(self.dropout(torch.softmax(scores + score_mask, dim=-1)) @ part)
        return self.o_proj(torch.cat(outputs, dim=-1)), all_scores


class FeedForward(nn.Module):
    """Each slice through its convolution, activation, dense, dropout."""

    def __init__(self, config: MixLMConfig):
        super().__init__()
        channels = config.ff_dim // config.n_experts
        self.convolutions = nn.ModuleList(MaskedConvolution(config, channels) for _ in range(config.n_experts))
        self.activation = {"gelu": nn.GELU(), "relu": nn.ReLU(), "swish": nn.SiLU()}[config.act_fn]
        self.dense = nn.Linear(config.ff_dim, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout_prob)

    def forward(self, hidden: Tensor, token_mask: Tensor) -> Tensor:
        slices = (hidden * token_mask).transpose(1, 2).chunk(len(self.convolutions), dim=1)
        convolved = [convolution(part) for convolution, part in zip(self.convolutions, slices, strict=True)]
        return self.dropout(self.dense(self.activation(torch.cat(convolved, dim=1).transpose(1, 2))))


class OlderEncoder(nn.Module):
    """The encoder of a `MixLMModel`, with its weights. Pre-LN or post-LN, any sharing."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        config = encoder.config
        self.pre_norm = config.ln_pos == 0
        self.embeddings = encoder.embeddings
        self.norms, self.final_norm = encoder.stack.layers, encoder.stack.final_norm
        self.attentions = nn.ModuleList(Attention(config) for _ in encoder.stack.attentions)
        self.feed_forwards = nn.ModuleList(FeedForward(config) for _ in encoder.stack.feed_forwards)
        for mine, given in zip(self.attentions, encoder.stack.attentions, strict=True):
            mine.o_proj = given.o_proj
            for number, key in enumerate(mine.keys):
                key.copy_from(given.key.convolutions, number)
        for mine, given in zip(self.feed_forwards, encoder.stack.feed_forwards, strict=True):
            mine.dense = given.dense
            for number, convolution in enumerate(mine.convolutions):
                convolution.copy_from(given.convolution.convolutions, number)
        self.num_layers = config.num_hidden_layers

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """[B, L] -> [B, L, C]."""
        hidden = self.embeddings(input_ids, token_type_ids, None, None)
        token_mask = attention_mask.to(hidden.dtype)[..., None]
        score_mask = (1 - token_mask.transpose(1, 2)) * torch.finfo(hidden.dtype).min
        scores = None
        for layer in range(self.num_layers):
            # A group of layers shares the module whose turn it is; the number of modules tells the size of a group.
            norms = self.norms[layer * len(self.norms) // self.num_layers]
            attention = self.attentions[layer * len(self.attentions) // self.num_layers]
            feed_forward = self.feed_forwards[layer * len(self.feed_forwards) // self.num_layers]
            if self.pre_norm:
                attended, scores = attention(norms.attention_norm(hidden), scores, token_mask, score_mask)
                hidden = hidden + attended
                hidden = hidden + feed_forward(norms.feed_forward_norm(hidden), token_mask)
            else:
                attended, scores = attention(hidden, scores, token_mask, score_mask)
                hidden = norms.attention_norm(hidden + attended)
                hidden = norms.feed_forward_norm(hidden + feed_forward(hidden, token_mask))
        return self.final_norm(hidden)


class OlderForPreTraining(nn.Module):
    """MLM at all positions and SOP, with the weights of a `MixLMForPreTraining`."""

    def __init__(self, model: MixLMForPreTraining):
        super().__init__()
        self.encoder = OlderEncoder(model.encoder)
        self.mlm_head, self.sop_head = model.mlm_head, model.sop_head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, sentence_order_label: Tensor
    ) -> PreTrainingOutput:
        """The sum of the MLM and SOP losses."""
        hidden = self.encoder(input_ids, attention_mask)
        logits = self.mlm_head(hidden)
        mlm_loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        return PreTrainingOutput(loss=mlm_loss + F.cross_entropy(self.sop_head(hidden), sentence_order_label))
