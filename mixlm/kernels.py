"""The fast parts of the encoders: what stands behind their formulas when speed or memory is at stake.

Every function here has a plain form in torch's own operations beside it, and gives the same numbers. `choose_kernels`
is the one place where the form of a forward pass is chosen.

Letters of the shapes: batch B, length L, hidden size C, attention maps E (MixLM: slices), width of a map D, kernel
groups G, feed-forward width F.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Tokens whose feed-forward is computed at once: enough for matrix products to run at full speed, and few enough for
# the activations to stay in the cache and for the buffers to be cheap to get.
TOKENS_PER_BLOCK = 512
# Below both of these a step is so small that the calls of the fused forms cost more than they save.
WIDTH_WORTH_FUSING, LENGTH_WORTH_FUSING = 256, 512
# From this length on, activations rather than weights fill the memory of a training step.
LENGTH_WORTH_RECOMPUTING = 1024


# -- the choice ------------------------------------------------------------------------------------------------------


class Kernels(NamedTuple):
    """The forms of one forward pass.

    Args:
        fused: the feed-forward as one function, and scores that are added in place, rather than torch's operations
            one by one.
        recompute: the backward pass computes the activations of the feed-forward again instead of keeping them.
    """

    fused: bool
    recompute: bool


def is_traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is recording: they see through plain operations only."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def choose_kernels(setting: str, hidden: Tensor, plain_needed: bool) -> Kernels:
    """The forms for this input, [B, L, C].

    Args:
        setting: `config.kernels`. "auto" follows what was measured on a CPU (benchmarks/README.md): the fused forms
            keep less, and in time they are 1.03 to 1.4 times as fast as plain ones from hidden size 384 or 512 tokens
            on, 4 to 8% slower at a hidden size of 256, and up to 18% slower below; from 1,024 tokens on recomputing
            is worth its time. On other devices nothing was measured, and torch's own operations run. "plain", "fused"
            and "lean" force a choice.
        hidden: the input of the stack.
        plain_needed: somebody wants what the fused forms do not have: attention probabilities with a gradient, or
            scores that gradient checkpointing can run twice from.
    """
    if setting == "plain" or plain_needed or is_traced():
        return Kernels(fused=False, recompute=False)
    if setting == "auto":
        _, length, width = hidden.shape
        is_worth_it = width >= WIDTH_WORTH_FUSING or length >= LENGTH_WORTH_FUSING
        return Kernels(hidden.device.type == "cpu" and is_worth_it, recompute=length >= LENGTH_WORTH_RECOMPUTING)
    return Kernels(fused=True, recompute=setting == "lean")


def is_bare(module: nn.Module, its_class: type[nn.Module]) -> bool:
    """Whether calling the module does what its class says and nothing else, so that its weights may be used directly.

    Not so after it or a weight was swapped for another (adapters, quantisation, sharding), or with hooks (probing,
    offloading).
    """
    hooks = (
        *(module._forward_hooks, module._forward_pre_hooks),
        *(module._backward_hooks, module._backward_pre_hooks),
    )
    return (
        type(module) is its_class
        and "forward" not in vars(module)
        and not any(hooks)
        and all(type(parameter) is nn.Parameter for parameter in module.parameters(recurse=False))
    )


def to_autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the precision that autocast asks for: its own rules do not reach into a custom function."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


# -- dropout ---------------------------------------------------------------------------------------------------------


def draw_seed() -> int:
    """A seed from torch's CPU generator. A mask that is a function of its seed need not be kept for the backward."""
    return int(torch.empty((), dtype=torch.int64).random_())


def dropout_factors(like: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """What dropout multiplies by: 0 with `probability`, else 1 / (1 - probability); shape and type of `like`.

    One random 64-bit integer decides on four entries, each by comparing 16 bits with a threshold: on a CPU that is
    five times faster than torch's Bernoulli numbers. The probability is rounded to 1/65,536, and the factor to it.
    """
    threshold = min(round(probability * 65536), 65535)
    integers = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    integers.random_(-(2**63), None, generator=generator)
    sixteen_bits = integers.view(torch.int16)[: like.numel()].view(like.shape)
    factors = torch.empty_like(like, memory_format=torch.contiguous_format)
    torch.ge(sixteen_bits, threshold - 32768, out=factors)
    return factors.mul_(65536 / (65536 - threshold))


def seeded(seed: int, device: torch.device) -> torch.Generator:
    """A new generator on `device`."""
    return torch.Generator(device).manual_seed(seed)


class _SeededDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, probability: float, seed: int) -> Tensor:
        ctx.probability, ctx.seed = probability, seed
        return dropout_factors(hidden, probability, seeded(seed, hidden.device)).mul_(hidden)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        factors = dropout_factors(gradient, ctx.probability, seeded(ctx.seed, gradient.device))
        return factors * gradient, None, None


class Dropout(nn.Dropout):
    """Dropout whose mask is drawn cheaply and not kept: nn.Dropout in all else."""

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return hidden
        if is_traced():
            return F.dropout(hidden, self.p)
        return _SeededDropout.apply(hidden, self.p, draw_seed())


# -- attention with residual scores ----------------------------------------------------------------------------------


def residual_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    previous_scores: Tensor | None,
    attention_mask: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention that adds the previous layer's raw scores to its own (RealFormer, arXiv:2012.11747, eq. 3).

    Args:
        queries, keys, values: [B, L, E, D].
        previous_scores: [B, E, L, L] before the mask and the softmax, or None in the first layer.
        attention_mask: bool [B, 1, 1, L], True for real tokens, or None.
        dropout: the probability for the attention probabilities; 0 outside of training.

    Returns:
        the attended values [B, L, E, D], the probabilities and the raw scores to carry on [B, E, L, L].
    """
    queries, keys, values = queries.transpose(1, 2), keys.permute(0, 2, 3, 1), values.transpose(1, 2)
    scores = queries @ keys / math.sqrt(queries.shape[-1])
    if previous_scores is not None:
        scores = scores + previous_scores
    visible = scores
    if attention_mask is not None:
        visible = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    probabilities = visible.softmax(dim=-1)
    dropped = probabilities
    if dropout and is_traced():
        dropped = F.dropout(probabilities, dropout)
    elif dropout:  # map by map, as the reversible form draws
        generator = seeded(draw_seed(), scores.device)
        factors = [dropout_factors(each, dropout, generator) for each in probabilities.unbind(dim=1)]
        dropped = probabilities * torch.stack(factors, dim=1)
    return (dropped @ values).transpose(1, 2), probabilities, scores


def reversible_residual_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    previous_scores: Tensor | None,
    attention_mask: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """`residual_attention` with one buffer of scores for the whole stack. Arguments as there.

    A layer adds H Kᵀ / √D to the scores S in place. Nothing of size L x L is kept for the backward pass, which runs
    through the layers from the last to the first: it finds this layer's S in the buffer, makes the probabilities from
    it again, and leaves S - H Kᵀ / √D there, the scores of the layer before. (Reversible residuals: RevNet,
    arXiv:1707.04585.) The dropout mask is drawn again from its seed. Map by map, so that what is needed in between is
    of size B x L x L and stays in the cache.

    The scores are summed in float32 at least: subtracting again in 16 bits would not lead back.

    Returns:
        the attended values [B, L, E, D] and the raw scores to carry on [B, E, L, L]: the memory of `previous_scores`,
        with other content. A backward pass can therefore run only once, and only through all layers that were run.
    """
    seed = draw_seed() if dropout else 0
    attended, scores = _ReversibleAttention.apply(
        *to_autocast(queries, keys, values), previous_scores, attention_mask, dropout, seed
    )
    if scores.grad_fn is not None:
        scores.grad_fn.version = scores._version
    return attended, scores


class _ReversibleAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, keys, values, previous_scores, attention_mask, dropout, seed):
        ctx.set_materialize_grads(False)
        batch, length, maps, _ = queries.shape
        scores = previous_scores
        if previous_scores is None:
            dtype = torch.promote_types(queries.dtype, torch.float32)
            scores = queries.new_zeros(batch, maps, length, length, dtype=dtype)
        else:
            ctx.mark_dirty(previous_scores)
        generator = seeded(seed, queries.device) if dropout else None
        attended = torch.empty_like(values)
        for each in range(maps):
            _add_product(scores[:, each], queries[:, :, each], keys[:, :, each], sign=1)
            probabilities, factors = _probabilities(scores[:, each], attention_mask, dropout, generator)
            if dropout:
                probabilities.mul_(factors)
            torch.bmm(probabilities.to(values.dtype), values[:, :, each], out=attended[:, :, each])
        ctx.save_for_backward(queries, keys, values, attention_mask)
        ctx.dropout, ctx.seed, ctx.is_first = dropout, seed, previous_scores is None
        # Another tensor on the same memory: keeping the output itself would be a cycle, and saving it would count the
        # changes that later layers make.
        ctx.scores = scores.detach()
        return attended, scores

    @staticmethod
    @once_differentiable
    def backward(ctx, by_attended, by_scores):
        queries, keys, values, attention_mask = ctx.saved_tensors
        scores, ctx.scores = ctx.scores, None
        if scores is None:
            raise RuntimeError(
                "the attention scores were used up by an earlier backward pass; a model that is differentiated twice "
                'needs the configuration field kernels="plain"'
            )
        if by_scores is None and scores._version != ctx.version:  # else the next layer has led back to this one
            raise RuntimeError(
                "later layers, which take no part in this backward pass, have changed the attention scores; a loss "
                'that depends on the hidden states of inner layers alone needs the configuration field kernels="plain"'
            )
        by_scores = torch.zeros_like(scores) if by_scores is None else by_scores
        by_queries, by_keys, by_values = (torch.empty_like(tensor) for tensor in (queries, keys, values))
        generator = seeded(ctx.seed, queries.device) if ctx.dropout else None
        # The probabilities in a text of padding alone are not a function of its scores.
        has_keys = None if attention_mask is None else attention_mask.any(dim=-1)  # [B, 1, 1]
        for each in range(queries.shape[2]):
            probabilities, factors = _probabilities(scores[:, each], attention_mask, ctx.dropout, generator)
            dropped = probabilities * factors if ctx.dropout else probabilities
            output = by_attended[:, :, each].to(values.dtype)
            torch.bmm(dropped.to(values.dtype).transpose(1, 2), output, out=by_values[:, :, each])
            output = output if has_keys is None else output * has_keys
            by_probabilities = torch.bmm(output, values[:, :, each].transpose(1, 2)).to(scores.dtype)
            if ctx.dropout:
                by_probabilities.mul_(factors)
            # In place: the gradient of the carried scores comes from the next layer's backward alone.
            total = by_scores[:, each]
            total += torch._softmax_backward_data(by_probabilities, probabilities, -1, scores.dtype)
            by_product = total.to(queries.dtype)
            torch.bmm(by_product, keys[:, :, each], out=by_queries[:, :, each])
            torch.bmm(by_product.transpose(1, 2), queries[:, :, each], out=by_keys[:, :, each])
            if not ctx.is_first:
                _add_product(scores[:, each], queries[:, :, each], keys[:, :, each], sign=-1)
        scaling = 1 / math.sqrt(queries.shape[-1])
        by_queries, by_keys = by_queries.mul_(scaling), by_keys.mul_(scaling)
        return by_queries, by_keys, by_values, None if ctx.is_first else by_scores, None, None, None


def _add_product(scores: Tensor, queries: Tensor, keys: Tensor, sign: int) -> None:
    """scores [B, L, L] += sign x queries keysᵀ / √D, with both [B, L, D]."""
    scaling = sign / math.sqrt(queries.shape[-1])
    if scores.dtype == queries.dtype:
        scores.baddbmm_(queries, keys.transpose(1, 2), alpha=scaling)
    else:
        scores.add_(torch.bmm(queries, keys.transpose(1, 2)), alpha=scaling)


def _probabilities(
    scores: Tensor, attention_mask: Tensor | None, dropout: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor | None]:
    """The softmax of one map's scores [B, L, L] and its dropout factors (None without dropout)."""
    visible = scores
    if attention_mask is not None:
        # Added, not filled in: one pass less. The lowest number swallows any score.
        hiding = torch.zeros_like(attention_mask[:, 0], dtype=scores.dtype)
        visible = scores + hiding.masked_fill_(~attention_mask[:, 0], torch.finfo(scores.dtype).min)
    probabilities = visible.softmax(dim=-1)
    return probabilities, dropout_factors(scores, dropout, generator) if dropout else None


# -- mixed-kernel convolutions ---------------------------------------------------------------------------------------


def mixed_kernel_convolution(hidden: Tensor, convolutions: nn.ModuleList, slices: int) -> Tensor:
    """Each slice of the hidden state through its own grouped convolution: [B, L, C] -> [B, L, slices, M].

    Group g of a slice goes through a kernel of its own size. The slices have the same sizes, so that one convolution
    per kernel size, with the slices as its groups, serves them all, and no tap is spent on the zero rim of a smaller
    kernel. The weight of each is [slices x M / G, C / (slices x G), taps].

    A text lies in an image of height 1 with its channels last, which is how tokens are stored already.
    """
    batch, length, _ = hidden.shape
    by_group = hidden.view(batch, length, slices, len(convolutions), -1).unbind(dim=3)
    convolved = []
    for convolution, inputs in zip(convolutions, by_group, strict=True):
        image = inputs.reshape(batch, 1, length, -1).permute(0, 3, 1, 2)
        weight = convolution.weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        output = F.conv2d(image, weight, convolution.bias, padding=(0, weight.shape[-1] // 2), groups=slices)
        convolved.append(output.permute(0, 2, 3, 1).reshape(batch, length, slices, -1))
    return torch.cat(convolved, dim=-1)


def mixed_kernel_feed_forward(
    hidden: Tensor,
    token_mask: Tensor | None,
    convolutions: nn.ModuleList,
    dense: nn.Linear,
    slices: int,
    activation: str,
    recompute: bool,
) -> Tensor:
    """dense(activation(mixed_kernel_convolution(hidden x token_mask))) as one function: [B, L, C] -> [B, L, C].

    Convolution as a matrix product (im2col): the input of kernel group g in slice e, with its rim of zeros, is
    X [L + k - 1, c] with c = C / (E G). Row t of the matrix [L, k c] is X[t : t + k], so the convolution is that
    matrix times the kernel as [k c, M / G]. All rows lie in X already, overlapping; one copy makes a matrix that a
    matrix product takes, and that is cheap: k c numbers for 2 k c M / G operations. The backward pass makes the copy
    again, and what the product says of the gradient of a row goes back to where the row came from (col2im).

    It works through blocks of TOKENS_PER_BLOCK tokens, from the convolution to the dense layer, so that activations of
    width F are in the cache when they are needed again. Only the input of the activation function is kept for the
    backward pass, or, with `recompute`, nothing of width F.

    Args:
        hidden: [B, L, C].
        token_mask: [B, L, 1], 0 for padding, which a kernel must not see; None where there is no padding.
        convolutions: one Conv1d a kernel group, as in `mixed_kernel_convolution`.
        dense: Linear, F -> C.
        slices: E.
        activation: a name in ACTIVATIONS.
        recompute: compute the convolution again in the backward pass.
    """
    keep = torch.is_grad_enabled() and not recompute
    weights, biases = zip(*((each.weight, each.bias) for each in convolutions), strict=True)
    hidden, *parameters = to_autocast(hidden, dense.weight, dense.bias, *weights, *biases)
    if token_mask is not None:
        token_mask = token_mask.to(hidden.dtype)
    return _FusedFeedForward.apply(hidden, token_mask, slices, activation, keep, *parameters)


class Activation(NamedTuple):
    """An activation function and its derivative as operations that write into a given tensor."""

    forward: torch._ops.OpOverload
    backward: torch._ops.OpOverload


def _relu_backward(gradient: Tensor, entering: Tensor, *, grad_input: Tensor) -> None:
    torch.ops.aten.threshold_backward.grad_input(gradient, entering, 0, grad_input=grad_input)


ACTIVATIONS = {
    "gelu": Activation(torch.ops.aten.gelu.out, torch.ops.aten.gelu_backward.grad_input),
    "relu": Activation(torch.ops.aten.relu.out, _relu_backward),
    "swish": Activation(torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input),
}


class _FusedFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, token_mask, slices, activation, keep, dense_weight, dense_bias, *parameters):
        weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        windows = _Windows(hidden, token_mask, [weight.shape[-1] for weight in weights], slices)
        kernels = [_as_matrices(weight, slices) for weight in weights]
        bias = _as_one(biases, slices)
        batch, length, _ = hidden.shape
        width = dense_weight.shape[1]
        kept = hidden.new_empty(batch, length, width) if keep else None
        active_block = hidden.new_empty(windows.rows, width)
        output = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        for texts, tokens in windows.blocks():
            target = output[texts, tokens].flatten(0, 1)
            active = active_block[: len(target)]
            entering = kept[texts, tokens].flatten(0, 1) if keep else active  # in place where nothing is kept
            windows.convolve(kernels, bias, (texts, tokens), out=entering)
            ACTIVATIONS[activation].forward(entering, out=active)
            torch.addmm(dense_bias, active, dense_weight.T, out=target)
        ctx.save_for_backward(hidden, token_mask, kept, dense_weight, *parameters)
        ctx.slices, ctx.activation = slices, activation
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, by_output):
        hidden, token_mask, kept, dense_weight, *parameters = ctx.saved_tensors
        weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        windows = _Windows(hidden, token_mask, [weight.shape[-1] for weight in weights], ctx.slices)
        kernels = [_as_matrices(weight, ctx.slices) for weight in weights]
        bias = _as_one(biases, ctx.slices)
        by_kernels = [torch.empty_like(kernel) for kernel in kernels]
        by_dense_weight, by_padded = torch.empty_like(dense_weight), torch.zeros_like(windows.padded)
        width = dense_weight.shape[1]
        by_biases = hidden.new_zeros(width)
        active_block, by_active_block = hidden.new_empty(2, windows.rows, width).unbind()
        recomputed = hidden.new_empty(windows.rows, width) if kept is None else None
        by_output = by_output.contiguous()
        for number, (texts, tokens) in enumerate(windows.blocks()):
            beta = 0 if number == 0 else 1  # the first block writes the gradients of the weights, the others add
            by_target = by_output[texts, tokens].flatten(0, 1)
            active, by_active = active_block[: len(by_target)], by_active_block[: len(by_target)]
            if kept is None:
                entering = recomputed[: len(by_target)]
                windows.convolve(kernels, bias, (texts, tokens), out=entering)
            else:
                entering = kept[texts, tokens].flatten(0, 1)
            ACTIVATIONS[ctx.activation].forward(entering, out=active)
            by_dense_weight.addmm_(by_target.T, active, beta=beta)
            torch.mm(by_target, dense_weight, out=by_active)
            by_entering = active  # no longer needed, and of the right shape
            ACTIVATIONS[ctx.activation].backward(by_active, entering, grad_input=by_entering)
            by_biases += by_entering.sum(dim=0)
            windows.convolve_back(kernels, by_entering, (texts, tokens), by_padded, by_kernels, beta)
        by_hidden = windows.inside(by_padded)
        if token_mask is not None:
            by_hidden = by_hidden * token_mask
        by_weights = [_as_convolution(kernel, weight) for kernel, weight in zip(by_kernels, weights, strict=True)]
        by_biases = by_biases.view(ctx.slices, len(weights), -1).unbind(dim=1)
        by_dense_bias = by_output.sum(dim=(0, 1))
        return (
            *(by_hidden, None, None, None, None, by_dense_weight, by_dense_bias),
            *by_weights,
            *(bias.flatten() for bias in by_biases),
        )


class _Windows:
    """The overlapping windows of a batch of texts with its rim of zeros, for all kernel groups.

    A block says which texts and which of their tokens are computed at once.

    Args:
        hidden: [B, L, C].
        token_mask: [B, L, 1] or None.
        sizes: the kernel of each group, k.
        slices: E.
    """

    def __init__(self, hidden: Tensor, token_mask: Tensor | None, sizes: list[int], slices: int):
        batch, length, width = hidden.shape
        self.sizes, self.slices, self.rim = sizes, slices, max(sizes) // 2
        self.channels = width // (slices * len(sizes))
        self.texts = min(max(TOKENS_PER_BLOCK // length, 1), batch)
        self.tokens = min(TOKENS_PER_BLOCK, length)
        self.rows = self.texts * self.tokens  # of the largest block
        self.padded = hidden.new_zeros(batch, length + 2 * self.rim, width)
        if token_mask is None:
            self.inside(self.padded).copy_(hidden)
        else:
            torch.mul(hidden, token_mask, out=self.inside(self.padded))
        self.copies = hidden.new_empty(slices * self.rows * max(sizes) * self.channels)

    def inside(self, padded: Tensor) -> Tensor:
        """[B, L + 2 rim, C] -> [B, L, C] without the rim."""
        return padded[:, self.rim : padded.shape[1] - self.rim]

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Whole texts, or parts of a long one."""
        batch, length = len(self.padded), self.padded.shape[1] - 2 * self.rim
        for text in range(0, batch, self.texts):
            for token in range(0, length, self.tokens):
                yield slice(text, min(text + self.texts, batch)), slice(token, min(token + self.tokens, length))

    def convolve(self, kernels: list[Tensor], bias: Tensor, block: tuple[slice, slice], out: Tensor) -> None:
        """Write the convolution of a block into `out` [rows, F]; `bias` is [F]."""
        out.copy_(bias)
        for group, (kernel, output) in enumerate(zip(kernels, self._by_group(out), strict=True)):
            output.baddbmm_(self._matrices(block, group), kernel.transpose(1, 2))

    def convolve_back(
        self,
        kernels: list[Tensor],
        by_output: Tensor,
        block: tuple[slice, slice],
        by_padded: Tensor,
        by_kernels: list[Tensor],
        beta: int,
    ) -> None:
        """Add what a block's gradient [rows, F] says of the kernels and of the padded input to their gradients; with
        `beta` 0, what stands in those of the kernels is overwritten."""
        parts = zip(kernels, by_kernels, self._by_group(by_output), strict=True)
        for group, (kernel, by_kernel, by_group) in enumerate(parts):
            matrices = self._matrices(block, group)
            by_kernel.baddbmm_(by_group.transpose(1, 2), matrices, beta=beta)
            torch.bmm(by_group, kernel, out=matrices)
            windows = self._windows(by_padded, block, group)
            for window, part in zip(windows.unbind(dim=3), matrices.view(windows.shape).unbind(dim=3), strict=True):
                window += part

    def _by_group(self, wide: Tensor) -> tuple[Tensor, ...]:
        """[rows, F] -> for each kernel group [E, rows, F / (E G)]."""
        return wide.view(len(wide), self.slices, len(self.sizes), -1).permute(2, 1, 0, 3).unbind()

    def _windows(self, padded: Tensor, block: tuple[slice, slice], group: int) -> Tensor:
        """The windows of a kernel group, as they overlap in memory: [E, texts, tokens, k, c]."""
        texts, tokens = block
        size = self.sizes[group]
        by_group = padded.unflatten(2, (self.slices, len(self.sizes), self.channels))[:, :, :, group]
        first = by_group[texts, tokens.start + self.rim - size // 2 :]
        by_text, by_token, by_slice, by_channel = first.stride()
        return first.as_strided(
            (self.slices, len(first), tokens.stop - tokens.start, size, self.channels),
            (by_slice, by_text, by_token, by_token, by_channel),
        )

    def _matrices(self, block: tuple[slice, slice], group: int) -> Tensor:
        """A copy of the windows as a matrix for each slice, [E, texts x tokens, k c]; the next call overwrites it."""
        windows = self._windows(self.padded, block, group)
        copy = self.copies[: windows.numel()].view(windows.shape)
        return copy.copy_(windows).flatten(3).flatten(1, 2)


def _as_matrices(weight: Tensor, slices: int) -> Tensor:
    """The weight of a Conv1d, [E x rows, c, k] -> one matrix a slice, [E, rows, k c]."""
    return weight.unflatten(0, (slices, -1)).transpose(2, 3).flatten(2)


def _as_convolution(kernels: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `_as_matrices`: [E, rows, k c] -> the shape of `weight`, [E x rows, c, k]."""
    return kernels.unflatten(2, (weight.shape[2], weight.shape[1])).transpose(2, 3).reshape(weight.shape)


def _as_one(biases: list[Tensor], slices: int) -> Tensor:
    """The biases of the kernel groups, [E x rows] each -> the bias of the whole width [F], slice by slice."""
    return torch.stack([bias.view(slices, -1) for bias in biases], dim=1).flatten()


# -- experts ---------------------------------------------------------------------------------------------------------


def expert_feed_forward(
    tokens: Tensor,
    counts: list[int],
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    activation: str,
    recompute: bool,
) -> Tensor:
    """Each token through the feed-forward network of its expert, as one function: [T, C] -> [T, C].

    Autograd would make the gradient of every expert's weights on its own and then copy all of them into that of the
    stack; here each is computed where it belongs. An expert without tokens gets a gradient of zero. As in
    `mixed_kernel_feed_forward`, the input of the activation function is kept, or nothing of width F.

    Args:
        tokens: [T, C], those of expert 0 first, then those of expert 1, ...
        counts: how many tokens each expert has.
        up_weight, up_bias: [E, F, C] and [E, F].
        down_weight, down_bias: [E, C, F] and [E, C].
        activation: a name in ACTIVATIONS.
        recompute: compute the first layer again in the backward pass.
    """
    keep = torch.is_grad_enabled() and not recompute
    tensors = to_autocast(tokens, up_weight, up_bias, down_weight, down_bias)
    return _FusedExperts.apply(counts, activation, keep, *tensors)


def _expert_blocks(counts: list[int]) -> Iterator[tuple[int, slice, int]]:
    """At most TOKENS_PER_BLOCK tokens at once: the expert, its rows, and how many of its rows came before."""
    first = 0
    for expert, count in enumerate(counts):
        for before in range(0, count, TOKENS_PER_BLOCK):
            yield expert, slice(first + before, first + min(before + TOKENS_PER_BLOCK, count)), before
        first += count


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, counts, activation, keep, tokens, up_weight, up_bias, down_weight, down_bias):
        width = up_weight.shape[1]
        block = min(TOKENS_PER_BLOCK, max(counts))
        active_block = tokens.new_empty(block, width)
        kept = tokens.new_empty(len(tokens), width) if keep else None
        output = torch.empty_like(tokens)
        for expert, rows, _ in _expert_blocks(counts):
            active = active_block[: rows.stop - rows.start]
            entering = kept[rows] if keep else active  # in place where nothing is kept
            torch.addmm(up_bias[expert], tokens[rows], up_weight[expert].T, out=entering)
            ACTIVATIONS[activation].forward(entering, out=active)
            torch.addmm(down_bias[expert], active, down_weight[expert].T, out=output[rows])
        ctx.save_for_backward(tokens, kept, up_weight, up_bias, down_weight)
        ctx.counts, ctx.activation = counts, activation
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, by_output):
        tokens, kept, up_weight, up_bias, down_weight = ctx.saved_tensors
        by_output = by_output.contiguous()
        width = up_weight.shape[1]
        block = min(TOKENS_PER_BLOCK, max(ctx.counts))
        active_block, by_active_block, recomputed = tokens.new_empty(3, block, width).unbind()
        by_tokens = torch.empty_like(tokens)
        by_up_weight, by_down_weight = torch.empty_like(up_weight), torch.empty_like(down_weight)
        by_up_bias = torch.zeros_like(up_bias)
        by_down_bias = tokens.new_zeros(down_weight.shape[:2])
        for expert, count in enumerate(ctx.counts):
            if count == 0:
                by_up_weight[expert].zero_()
                by_down_weight[expert].zero_()
        for expert, rows, before in _expert_blocks(ctx.counts):
            size = rows.stop - rows.start
            active, by_active = active_block[:size], by_active_block[:size]
            if kept is None:
                entering = recomputed[:size]
                torch.addmm(up_bias[expert], tokens[rows], up_weight[expert].T, out=entering)
            else:
                entering = kept[rows]
            beta = 0 if before == 0 else 1  # the first block of an expert writes its gradient, the others add to it
            ACTIVATIONS[ctx.activation].forward(entering, out=active)
            by_down_weight[expert].addmm_(by_output[rows].T, active, beta=beta)
            by_down_bias[expert] += by_output[rows].sum(dim=0)
            torch.mm(by_output[rows], down_weight[expert], out=by_active)
            by_entering = active  # no longer needed, and of the right shape
            ACTIVATIONS[ctx.activation].backward(by_active, entering, grad_input=by_entering)
            by_up_weight[expert].addmm_(by_entering.T, tokens[rows], beta=beta)
            by_up_bias[expert] += by_entering.sum(dim=0)
            torch.mm(by_entering, up_weight[expert], out=by_tokens[rows])
        return None, None, None, by_tokens, by_up_weight, by_up_bias, by_down_weight, by_down_bias
