"""The fast parts of the encoders: what stands behind their formulas when speed or memory is at stake.

Whatever is fast here has a plain form in torch's own operations, and gives its numbers:
`reversible_residual_attention` those of `residual_attention`; `mixed_kernel_feed_forward` and `expert_feed_forward`
those of the modules that call them; `TokenConvolution` and `Dropout` are torch's modules in all but speed.
`choose_kernels` is the one place where the form of a forward pass is chosen.

Letters of the shapes: batch B, length L, hidden size C, attention maps E (MixLM: slices), width of a map D, kernel
groups G, feed-forward width F.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

# Tokens whose feed-forward is computed at once: enough for matrix products to run at full speed, and few enough for
# the activations to stay in the cache and for the buffers to be cheap to get.
TOKENS_PER_BLOCK = 512
# Fused from this hidden size or this length on. Below both, a step is so small that the calls of the fused forms cost
# more than they save.
WIDTH_WORTH_FUSING, LENGTH_WORTH_FUSING = 384, 512
# From this length on, activations rather than weights fill the memory of a training step.
LENGTH_WORTH_RECOMPUTING = 1024
OUTPUT_CAPTURING = "transformers.utils.output_capturing"


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


def is_transformed() -> bool:
    """Whether a transform of torch.func is at work, which the custom functions of this file do not know."""
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None


def choose_kernels(setting: str, hidden: Tensor, plain_needed: bool) -> Kernels:
    """The forms for this input, [B, L, C].

    Args:
        setting: `config.kernels`. "auto" follows what was measured on a CPU (benchmarks/README.md): fused where the
            hidden size is at least 384 or the length at least 512, for there the fused forms are 1.03 to 1.4 times as
            fast as plain ones, and below both up to 18% slower; recomputing from 1,024 tokens on. On other devices
            nothing was measured, and torch's own operations run. "plain", "fused" and "lean" force a choice.
        hidden: the input of the stack.
        plain_needed: somebody wants what the fused forms do not have, see
            `MixLMPreTrainedModel._needs_plain_kernels`.
    """
    if setting == "plain" or plain_needed or is_traced() or is_transformed():
        return Kernels(fused=False, recompute=False)
    if setting == "auto":
        _, length, width = hidden.shape
        is_worth_it = width >= WIDTH_WORTH_FUSING or length >= LENGTH_WORTH_FUSING
        return Kernels(hidden.device.type == "cpu" and is_worth_it, recompute=length >= LENGTH_WORTH_RECOMPUTING)
    return Kernels(fused=True, recompute=setting == "lean")


def is_bare(module: nn.Module, its_class: type[nn.Module]) -> bool:
    """Whether calling the module does what its class says and nothing else, with every weight and bias that the class
    has, so that they may be used directly.

    Not so after it or a weight was swapped for another (adapters, quantisation, sharding), without its bias, or with
    hooks, its own or those of all modules (probing, pruning, offloading). Those of transformers that note the outputs
    of layers stay for ever after they were asked for once, and do nothing where nobody asks.
    """
    hooks = (
        *(hook for hook in module._forward_hooks.values() if getattr(hook, "__module__", None) != OUTPUT_CAPTURING),
        *(*module._forward_pre_hooks, *module._backward_hooks, *module._backward_pre_hooks),
    )
    return (
        type(module) is its_class
        and "forward" not in vars(module)
        and not hooks
        and not _has_any_global_hook()
        and all(type(parameter) is nn.Parameter for parameter in module._parameters.values())
    )


# -- what the custom functions share ---------------------------------------------------------------------------------


def precision_of_products(hidden: Tensor) -> torch.dtype:
    """The type in which a custom function multiplies: that of its input, or what autocast asks for.

    Autocast's own rules do not reach into a custom function. It is handed the tensors as they are and casts inside, so
    that what it keeps for the backward pass are the parameters themselves, not a copy for each call of a shared layer.
    """
    device = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.is_autocast_enabled(device):  # autocast leaves float64 alone
        return hidden.dtype
    return torch.get_autocast_dtype(device)


def sums_like(tensor: Tensor) -> Tensor:
    """Zeros to add a gradient to, block by block: in float32 at least, for 16 bits would round at every addition."""
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def add_product(total: Tensor, left: Tensor, right: Tensor, scaling: float = 1) -> None:
    """total += scaling x left @ right, of a matrix or a batch of them; the sum may be of higher precision."""
    if total.dtype != left.dtype:
        total.add_(left @ right, alpha=scaling)
    elif total.dim() == 2:
        total.addmm_(left, right, alpha=scaling)
    else:
        total.baddbmm_(left, right, alpha=scaling)


def first_derivatives_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that works in place and cannot be differentiated itself: an error where that is asked for.

    Gradients are enabled in a backward pass with create_graph=True, and there alone.
    """

    @functools.wraps(backward)
    def checked(ctx, *gradients):
        if torch.is_grad_enabled():
            raise RuntimeError('second derivatives (create_graph=True) need the configuration field kernels="plain"')
        return backward(ctx, *gradients)

    return checked


# -- dropout ---------------------------------------------------------------------------------------------------------


def draw_seed() -> int:
    """A seed from torch's CPU generator. A mask that is a function of its seed need not be kept for the backward."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


def draws_from_seed(hidden: Tensor) -> bool:
    """Whether dropout of `hidden` draws from a seed: cheaper on a CPU, and not what a compiler can see through."""
    return hidden.device.type == "cpu" and not is_traced()


def dropout_factors(like: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """What dropout multiplies by: 0 with `probability`, else 1 / (1 - probability); shape and type of `like`.

    One random 64-bit integer decides on four entries, each by comparing 16 bits with a threshold: on a CPU that is
    five times faster than torch's Bernoulli numbers. The probability is rounded to 1/65,536, and the factor to it.
    """
    if probability == 1:
        return torch.zeros_like(like, memory_format=torch.contiguous_format)
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
    def forward(hidden: Tensor, probability: float, seed: int) -> Tensor:
        return dropout_factors(hidden, probability, seeded(seed, hidden.device)).mul_(hidden)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, float, int], output: Tensor) -> None:
        _, ctx.probability, ctx.seed = inputs  # on its own, as torch.func wants it

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        factors = dropout_factors(gradient, ctx.probability, seeded(ctx.seed, gradient.device))
        return factors * gradient, None, None


class Dropout(nn.Dropout):
    """Dropout whose mask is, on a CPU, drawn cheaply and not kept: nn.Dropout in all else."""

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return hidden
        if draws_from_seed(hidden):
            return _SeededDropout.apply(hidden, self.p, draw_seed())
        return F.dropout(hidden, self.p)


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
    if dropout and not draws_from_seed(scores):
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
        with other content. They are valid until the next layer runs, which adds its own to them. A backward pass can
        therefore run only once, and only through all layers that were run.
    """
    seed, dtype = draw_seed() if dropout else 0, precision_of_products(queries)
    attended, scores = _ReversibleAttention.apply(
        queries, keys, values, previous_scores, attention_mask, dropout, seed, dtype
    )
    if scores.grad_fn is not None:
        scores.grad_fn.version = scores._version
    return attended, scores


class _ReversibleAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, keys, values, previous_scores, attention_mask, dropout, seed, dtype):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(queries, keys, values, attention_mask)
        ctx.dropout, ctx.seed, ctx.dtype, ctx.is_first = dropout, seed, dtype, previous_scores is None
        queries, keys, values = (tensor.to(dtype) for tensor in (queries, keys, values))
        batch, length, maps, width = queries.shape
        scores = previous_scores
        if previous_scores is None:
            scores = queries.new_zeros(batch, maps, length, length, dtype=torch.promote_types(dtype, torch.float32))
        else:
            ctx.mark_dirty(previous_scores)
        generator = seeded(seed, queries.device) if dropout else None
        attended = torch.empty_like(values)
        for each in range(maps):
            add_product(
                scores[:, each], queries[:, :, each], keys[:, :, each].transpose(1, 2), scaling=1 / math.sqrt(width)
            )
            probabilities, factors = _probabilities(scores[:, each], attention_mask, dropout, generator)
            if dropout:
                probabilities.mul_(factors)
            torch.bmm(probabilities.to(dtype), values[:, :, each], out=attended[:, :, each])
        # Another tensor on the same memory: keeping the output itself would be a cycle, and saving it would count the
        # changes that later layers make.
        ctx.scores = scores.detach()
        return attended, scores

    @staticmethod
    @first_derivatives_only
    def backward(ctx, by_attended, by_scores):
        queries, keys, values, attention_mask = ctx.saved_tensors
        queries, keys, values = (tensor.to(ctx.dtype) for tensor in (queries, keys, values))
        for_queries, for_keys, for_values, *_ = ctx.needs_input_grad
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
        by_queries, by_keys, by_values = (torch.zeros_like(tensor) for tensor in (queries, keys, values))
        generator = seeded(ctx.seed, queries.device) if ctx.dropout else None
        scaling = 1 / math.sqrt(queries.shape[-1])
        # The probabilities in a text of padding alone are not a function of its scores.
        has_keys = None if attention_mask is None else attention_mask.any(dim=-1)  # [B, 1, 1]
        for each in range(queries.shape[2]):
            probabilities, factors = _probabilities(scores[:, each], attention_mask, ctx.dropout, generator)
            output = by_attended[:, :, each]
            if for_values:
                dropped = probabilities * factors if ctx.dropout else probabilities
                torch.bmm(dropped.to(ctx.dtype).transpose(1, 2), output, out=by_values[:, :, each])
            output = output if has_keys is None else output * has_keys
            by_probabilities = torch.bmm(output, values[:, :, each].transpose(1, 2)).to(scores.dtype)
            if ctx.dropout:
                by_probabilities.mul_(factors)
            # In place: the gradient of the carried scores comes from the next layer's backward alone.
            total = by_scores[:, each]
            total += torch._softmax_backward_data(by_probabilities, probabilities, -1, scores.dtype)
            by_product = total.to(ctx.dtype)
            if for_queries:
                add_product(by_queries[:, :, each], by_product, keys[:, :, each], scaling)
            if for_keys:
                add_product(by_keys[:, :, each], by_product.transpose(1, 2), queries[:, :, each], scaling)
            if not ctx.is_first:
                add_product(scores[:, each], queries[:, :, each], keys[:, :, each].transpose(1, 2), -scaling)
        return by_queries, by_keys, by_values, None if ctx.is_first else by_scores, None, None, None, None


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


class TokenConvolution(nn.Conv1d):
    """nn.Conv1d, with stride 1, for channels that are stored token by token, as a hidden state is.

    A text lies in an image of height 1 with its channels last, for which torch's convolutions are faster.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, channels, L] -> [B, channels, L], each in the memory of [B, L, channels]."""
        weight = self.weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        image = inputs.unsqueeze(2)
        return F.conv2d(image, weight, self.bias, padding=(0, *self.padding), groups=self.groups).squeeze(2)


def mixed_kernel_convolution(hidden: Tensor, convolutions: nn.ModuleList, slices: int) -> Tensor:
    """Each slice of the hidden state through its own grouped convolution: [B, L, C] -> [B, L, slices, M].

    Group g of a slice goes through a kernel of its own size. The slices have the same sizes, so that one convolution
    per kernel size, with the slices as its groups, serves them all, and no tap is spent on the zero rim of a smaller
    kernel. The weight of each is [slices x M / G, C / (slices x G), taps].
    """
    by_group = hidden.unflatten(2, (slices, len(convolutions), -1)).unbind(dim=3)
    convolved = [
        convolution(inputs.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (slices, -1))
        for convolution, inputs in zip(convolutions, by_group, strict=True)
    ]
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
        convolutions: one a kernel group, as in `mixed_kernel_convolution`.
        dense: Linear, F -> C.
        slices: E.
        activation: a name in ACTIVATIONS.
        recompute: compute the convolution again in the backward pass.
    """
    keep, dtype = torch.is_grad_enabled() and not recompute, precision_of_products(hidden)
    weights, biases = zip(*((each.weight, each.bias) for each in convolutions), strict=True)
    return _FusedFeedForward.apply(
        *(hidden, token_mask, slices, activation, keep, dtype, dense.weight, dense.bias), *weights, *biases
    )


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
    def forward(ctx, hidden, token_mask, slices, activation, keep, dtype, dense_weight, dense_bias, *parameters):
        weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        windows = _Windows(hidden, token_mask, [weight.shape[-1] for weight in weights], slices, dtype)
        kernels, bias = _as_matrices(weights, slices, dtype), _as_one(biases, slices, dtype)
        batch, length, width = *hidden.shape[:2], dense_weight.shape[1]
        kept = hidden.new_empty(batch, length, width, dtype=dtype) if keep else None
        active_block = hidden.new_empty(windows.rows, width, dtype=dtype)
        output = torch.empty_like(hidden, dtype=dtype, memory_format=torch.contiguous_format)
        to_output, output_bias = dense_weight.to(dtype).T, dense_bias.to(dtype)
        for texts, tokens in windows.blocks():
            target = output[texts, tokens].flatten(0, 1)
            active = active_block[: len(target)]
            entering = kept[texts, tokens].flatten(0, 1) if keep else active  # in place where nothing is kept
            windows.convolve(kernels, bias, (texts, tokens), out=entering)
            ACTIVATIONS[activation].forward(entering, out=active)
            torch.addmm(output_bias, active, to_output, out=target)
        ctx.save_for_backward(hidden, token_mask, kept, dense_weight, *parameters)
        ctx.slices, ctx.activation, ctx.dtype = slices, activation, dtype
        return output

    @staticmethod
    @first_derivatives_only
    def backward(ctx, by_output):
        hidden, token_mask, kept, dense_weight, *parameters = ctx.saved_tensors
        weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        for_hidden, *_ = ctx.needs_input_grad
        for_dense, for_convolutions = any(ctx.needs_input_grad[6:8]), any(ctx.needs_input_grad[8:])
        windows = _Windows(hidden, token_mask, [weight.shape[-1] for weight in weights], ctx.slices, ctx.dtype)
        kernels, bias = _as_matrices(weights, ctx.slices, ctx.dtype), _as_one(biases, ctx.slices, ctx.dtype)
        by_kernels, by_bias = [sums_like(kernel) for kernel in kernels], sums_like(bias)
        by_dense_weight, by_padded = sums_like(dense_weight), sums_like(windows.padded)
        active_block, by_active_block = windows.padded.new_empty(2, windows.rows, len(bias)).unbind()
        recomputed = windows.padded.new_empty(windows.rows, len(bias)) if kept is None else None
        from_output, by_output = dense_weight.to(ctx.dtype), by_output.contiguous()
        for texts, tokens in windows.blocks():
            by_target = by_output[texts, tokens].flatten(0, 1)
            active, by_active = active_block[: len(by_target)], by_active_block[: len(by_target)]
            if kept is None:
                entering = recomputed[: len(by_target)]
                windows.convolve(kernels, bias, (texts, tokens), out=entering)
            else:
                entering = kept[texts, tokens].flatten(0, 1)
            if for_dense:
                ACTIVATIONS[ctx.activation].forward(entering, out=active)
                add_product(by_dense_weight, by_target.T, active)
            if for_convolutions or for_hidden:
                torch.mm(by_target, from_output, out=by_active)
                by_entering = active  # no longer needed, and of the right shape
                ACTIVATIONS[ctx.activation].backward(by_active, entering, grad_input=by_entering)
            if for_convolutions:
                by_bias += by_entering.sum(dim=0, dtype=by_bias.dtype)
                windows.add_to_kernels(by_kernels, by_entering, (texts, tokens))
            if for_hidden:
                windows.add_to_padded(by_padded, by_entering, kernels, (texts, tokens))
        by_hidden = windows.inside(by_padded)
        if token_mask is not None:
            by_hidden = by_hidden * token_mask
        by_weights = [_as_convolution(kernel, weight) for kernel, weight in zip(by_kernels, weights, strict=True)]
        by_biases = by_bias.view(ctx.slices, len(weights), -1).unbind(dim=1)
        by_dense_bias = by_output.sum(dim=(0, 1), dtype=by_dense_weight.dtype)
        return (
            *(by_hidden, None, None, None, None, None, by_dense_weight, by_dense_bias),
            *by_weights,
            *(by_bias.flatten() for by_bias in by_biases),
        )


class _Windows:
    """The overlapping windows of a batch of texts with its rim of zeros, for all kernel groups.

    A block says which texts and which of their tokens are computed at once.

    Args:
        hidden: [B, L, C].
        token_mask: [B, L, 1] or None.
        sizes: the kernel of each group, k.
        slices: E.
        dtype: of the copies that are multiplied.
    """

    def __init__(self, hidden: Tensor, token_mask: Tensor | None, sizes: list[int], slices: int, dtype: torch.dtype):
        batch, length, width = hidden.shape
        self.sizes, self.slices, self.rim = sizes, slices, max(sizes) // 2
        self.channels = width // (slices * len(sizes))
        self.texts = max(min(TOKENS_PER_BLOCK // length, batch), 1)
        self.tokens = min(TOKENS_PER_BLOCK, length)
        self.rows = self.texts * self.tokens  # of the largest block
        self.padded = hidden.new_zeros(batch, length + 2 * self.rim, width, dtype=dtype)
        if token_mask is None:
            self.inside(self.padded).copy_(hidden)
        else:
            torch.mul(hidden, token_mask, out=self.inside(self.padded))
        self.copies = self.padded.new_empty(slices * self.rows * max(sizes) * self.channels)

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

    def add_to_kernels(self, by_kernels: list[Tensor], by_output: Tensor, block: tuple[slice, slice]) -> None:
        """Add what a block's gradient [rows, F] says of the kernels to their gradients."""
        for group, (by_kernel, by_group) in enumerate(zip(by_kernels, self._by_group(by_output), strict=True)):
            add_product(by_kernel, by_group.transpose(1, 2), self._matrices(block, group))

    def add_to_padded(
        self, by_padded: Tensor, by_output: Tensor, kernels: list[Tensor], block: tuple[slice, slice]
    ) -> None:
        """Add what a block's gradient [rows, F] says of the padded input to its gradient."""
        for group, (kernel, by_group) in enumerate(zip(kernels, self._by_group(by_output), strict=True)):
            windows = self._windows(by_padded, block, group)
            parts = self._copy_of(windows)
            torch.bmm(by_group, kernel, out=parts.flatten(3).flatten(1, 2))
            for window, part in zip(windows.unbind(dim=3), parts.unbind(dim=3), strict=True):
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
        return self._copy_of(windows).copy_(windows).flatten(3).flatten(1, 2)

    def _copy_of(self, windows: Tensor) -> Tensor:
        """Memory in the shape of the windows, whose content the next call overwrites."""
        return self.copies[: windows.numel()].view(windows.shape)


def _as_matrices(weights: list[Tensor], slices: int, dtype: torch.dtype) -> list[Tensor]:
    """The weights of the convolutions, [E x rows, c, k] each -> one matrix a slice, [E, rows, k c]."""
    return [weight.to(dtype).unflatten(0, (slices, -1)).transpose(2, 3).flatten(2) for weight in weights]


def _as_convolution(kernels: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `_as_matrices`: [E, rows, k c] -> the shape of `weight`, [E x rows, c, k]."""
    return kernels.unflatten(2, (weight.shape[2], weight.shape[1])).transpose(2, 3).reshape(weight.shape)


def _as_one(biases: list[Tensor], slices: int, dtype: torch.dtype) -> Tensor:
    """The biases of the kernel groups, [E x rows] each -> the bias of the whole width [F], slice by slice."""
    return torch.stack([bias.to(dtype).view(slices, -1) for bias in biases], dim=1).flatten()


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
    keep, dtype = torch.is_grad_enabled() and not recompute, precision_of_products(tokens)
    return _FusedExperts.apply(tokens, up_weight, up_bias, down_weight, down_bias, counts, activation, keep, dtype)


def _expert_blocks(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """At most TOKENS_PER_BLOCK tokens at once: the expert and its rows."""
    first = 0
    for expert, count in enumerate(counts):
        for before in range(0, count, TOKENS_PER_BLOCK):
            yield expert, slice(first + before, first + min(before + TOKENS_PER_BLOCK, count))
        first += count


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, up_weight, up_bias, down_weight, down_bias, counts, activation, keep, dtype):
        width = up_weight.shape[1]
        kept = tokens.new_empty(len(tokens), width, dtype=dtype) if keep else None
        ctx.save_for_backward(kept, tokens, up_weight, up_bias, down_weight, down_bias)
        ctx.counts, ctx.activation, ctx.dtype = counts, activation, dtype
        tensors = (tokens, up_weight, up_bias, down_weight, down_bias)
        tokens, up_weight, up_bias, down_weight, down_bias = (tensor.to(dtype) for tensor in tensors)
        active_block = tokens.new_empty(min(TOKENS_PER_BLOCK, max(counts)), width)
        output = torch.empty_like(tokens)
        for expert, rows in _expert_blocks(counts):
            active = active_block[: rows.stop - rows.start]
            entering = kept[rows] if keep else active  # in place where nothing is kept
            torch.addmm(up_bias[expert], tokens[rows], up_weight[expert].T, out=entering)
            ACTIVATIONS[activation].forward(entering, out=active)
            torch.addmm(down_bias[expert], active, down_weight[expert].T, out=output[rows])
        return output

    @staticmethod
    @first_derivatives_only
    def backward(ctx, by_output):
        kept, *tensors = ctx.saved_tensors
        for_tokens, *for_parameters = ctx.needs_input_grad[:5]
        for_up, for_down = any(for_parameters[:2]), any(for_parameters[2:])
        by_up_weight, by_up_bias, by_down_weight, by_down_bias = (sums_like(parameter) for parameter in tensors[1:])
        tokens, up_weight, up_bias, down_weight, _ = (tensor.to(ctx.dtype) for tensor in tensors)
        by_tokens, by_output = torch.zeros_like(tokens), by_output.contiguous()
        block = min(TOKENS_PER_BLOCK, max(ctx.counts))
        active_block, by_active_block, recomputed = tokens.new_empty(3, block, up_weight.shape[1]).unbind()
        for expert, rows in _expert_blocks(ctx.counts):
            size = rows.stop - rows.start
            active, by_active = active_block[:size], by_active_block[:size]
            if kept is None:
                entering = recomputed[:size]
                torch.addmm(up_bias[expert], tokens[rows], up_weight[expert].T, out=entering)
            else:
                entering = kept[rows]
            if for_down:
                ACTIVATIONS[ctx.activation].forward(entering, out=active)
                add_product(by_down_weight[expert], by_output[rows].T, active)
                by_down_bias[expert] += by_output[rows].sum(dim=0, dtype=by_down_bias.dtype)
            if for_up or for_tokens:
                torch.mm(by_output[rows], down_weight[expert], out=by_active)
                by_entering = active  # no longer needed, and of the right shape
                ACTIVATIONS[ctx.activation].backward(by_active, entering, grad_input=by_entering)
            if for_up:
                add_product(by_up_weight[expert], by_entering.T, tokens[rows])
                by_up_bias[expert] += by_entering.sum(dim=0, dtype=by_up_bias.dtype)
            if for_tokens:
                torch.mm(by_entering, up_weight[expert], out=by_tokens[rows])
        return by_tokens, by_up_weight, by_up_bias, by_down_weight, by_down_bias, None, None, None, None
