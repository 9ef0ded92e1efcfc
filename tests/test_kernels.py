"""The kernels: every form of a forward pass gives the numbers of torch's own operations, and keeps what it says."""

import re
from types import SimpleNamespace

import pytest
import torch
from kernel_forms import (
    BOTH_FAMILIES,
    EVERY_FORM,
    EXACT,
    FORMS,
    LENGTHS,
    assert_forms_agree,
    assert_same_gradients,
    batch_of,
    dropping_model,
    run,
    some_numbers,
    weighted_sum,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixlm import MixLMModel, kernels
from mixlm.kernels import Dropout, dropout_factors, residual_attention, reversible_residual_attention
from mixlm.modeling_mixlm import MixedKernelConvolution

pytestmark = pytest.mark.usefixtures("blocks_end_inside_texts")


class TestFormsAgree:
    """Outputs and all gradients of "fused" and "lean" are those of "plain", while training with dropout."""

    @pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
    @pytest.mark.parametrize(
        "layer_group, shared_parameters", [(1, "all"), (2, "all"), (2, "ffn"), (2, "attention")], ids=str
    )
    @pytest.mark.parametrize("residual_attention", [True, False], ids=["residual", "ordinary"])
    @pytest.mark.parametrize("ln_pos", [0, 1], ids=["preln", "postln"])
    @BOTH_FAMILIES
    def test_structure(self, model_class, ln_pos, residual_attention, layer_group, shared_parameters, padded):
        model = dropping_model(
            model_class,
            ln_pos=ln_pos,
            residual_attention=residual_attention,
            layer_group=layer_group,
            shared_parameters=shared_parameters,
        )
        assert_forms_agree(model, batch_of(model, padded=padded))

    @pytest.mark.parametrize("act_fn", ["gelu", "relu", "swish"])
    @pytest.mark.parametrize("tokens_per_block", [1, 3, 7, 8, 16, 512])
    @BOTH_FAMILIES
    def test_blocks(self, model_class, tokens_per_block, act_fn, monkeypatch):
        """Of texts of 7 tokens: a token, parts of one, one, no part of a second, several, all."""
        monkeypatch.setattr(kernels, "TOKENS_PER_BLOCK", tokens_per_block)
        model = dropping_model(model_class, act_fn=act_fn, num_hidden_layers=1)
        assert_forms_agree(model, batch_of(model))

    @pytest.mark.parametrize(
        "kernel_size, num_heads, n_experts", [(1, 1, 1), (1, 2, 3), (3, 4, 1), (5, 1, 4), (9, 3, 2), (15, 2, 6)]
    )
    def test_mixlm_sizes(self, kernel_size, num_heads, n_experts):
        """Also kernels that are longer than the text and than a block."""
        model = dropping_model(
            MixLMModel,
            kernel_size=kernel_size,
            num_heads=num_heads,
            n_experts=n_experts,
            ff_dim=48,
        )
        assert_forms_agree(model, batch_of(model))

    @pytest.mark.parametrize("lengths", [[1], [1, 1, 1, 1, 1, 1, 1], [20, 3]], ids=str)
    @BOTH_FAMILIES
    def test_lengths(self, model_class, lengths):
        model = dropping_model(model_class)
        assert_forms_agree(model, batch_of(model, lengths))

    @BOTH_FAMILIES
    def test_a_row_of_padding_alone(self, model_class):
        model = dropping_model(model_class, num_hidden_layers=3)
        batch = batch_of(model)
        batch["attention_mask"][1] = 0
        assert_forms_agree(model, batch)

    @BOTH_FAMILIES
    def test_two_forward_passes_before_one_backward(self, model_class):
        """Each has scores of its own."""
        model = dropping_model(model_class)
        batch, other = batch_of(model), batch_of(model, [5, 9])
        assert_forms_agree(model, batch, loss_of=lambda output: weighted_sum(output) * weighted_sum(model(**other)))

    @BOTH_FAMILIES
    def test_hidden_states_of_all_layers_in_the_loss(self, model_class):
        def loss_of(output):
            return sum((hidden * some_numbers(*hidden.shape)).sum() for hidden in output.hidden_states)

        model = dropping_model(model_class)
        assert_forms_agree(model, batch_of(model), loss_of=loss_of, output_hidden_states=True)

    @pytest.mark.parametrize(
        "trained",
        [
            "",  # nothing but the input
            "embeddings.",
            "stack.layers.0.",
            "stack.attentions.0.",
            "stack.attentions.1.o_proj.weight",
            "stack.attentions.2.",
            "stack.feed_forwards.1.",
            "stack.final_norm.",
        ],
    )
    @pytest.mark.parametrize("inputs_trained", [True, False], ids=["inputs", "noinputs"])
    @BOTH_FAMILIES
    def test_frozen_parameters(self, model_class, trained, inputs_trained):
        if not trained and not inputs_trained:
            pytest.skip("nothing is trained")
        model = dropping_model(model_class, num_hidden_layers=3)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = bool(trained) and name.startswith(trained)
        batch = batch_of(model)
        if inputs_trained:
            assert_forms_agree(model, batch)
            return
        results = []
        for form in ("plain", *FORMS):
            model.config.kernels = form
            model.zero_grad()
            torch.manual_seed(5)
            weighted_sum(model(**batch)).backward()
            results.append({name: parameter.grad for name, parameter in model.named_parameters()})
            assert_same_gradients(results[-1], results[0])
        assert any(gradient is not None for gradient in results[0].values())

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @BOTH_FAMILIES
    def test_without_gradients(self, model_class, training, mode):
        model = dropping_model(model_class).train(training)
        outputs = []
        for form in ("plain", *FORMS):
            model.config.kernels = form
            torch.manual_seed(5)
            with mode():
                outputs.append(model(**batch_of(model)).last_hidden_state)
            torch.testing.assert_close(outputs[-1], outputs[0], **EXACT)

    @pytest.mark.parametrize("form", ["plain", *FORMS])
    def test_no_texts(self, form):
        model = dropping_model(MixLMModel)
        batch = {name: tensor[:0] for name, tensor in batch_of(model).items()}
        output, gradients = run(model, form, batch)
        assert output.last_hidden_state.shape == (0, max(LENGTHS), model.config.hidden_size)
        assert not any(gradient.any() for gradient in gradients.values() if gradient is not None)


class TestSixteenBits:
    """Rounding to 16 bits: what autocast leaves alone, what is kept, and how far gradients are from those of 32."""

    @BOTH_FAMILIES
    def test_autocast_leaves_float64_alone(self, model_class):
        model = dropping_model(model_class)
        with torch.autocast("cpu", torch.bfloat16):
            assert_forms_agree(model, batch_of(model))

    @pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "parameters"])
    @EVERY_FORM
    @BOTH_FAMILIES
    def test_no_further_off_than_plain_operations(self, model_class, form, autocast):
        """Over more than a hundred blocks of tokens, whose gradients of the weights are summed."""
        # One expert: rounding must not decide who computes a token.
        model = dropping_model(model_class, n_experts=1).float()
        batch = batch_of(model, [16] * 40)
        exact, exact_gradients = run(model, "plain", batch)
        model = model if autocast else model.bfloat16()

        def errors_of(each):
            """The errors of parameters of the same name in all layers are one: those of a few numbers are luck."""
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output, gradients = run(model, each, batch)
            errors = {"output": [(output.last_hidden_state - exact.last_hidden_state).flatten()]}
            for name, expected in exact_gradients.items():
                assert (gradients[name] is None) == (expected is None)
                if expected is not None:
                    assert gradients[name].dtype == (torch.float32 if autocast else torch.bfloat16)
                    errors.setdefault(re.sub(r"\d", "n", name), []).append((gradients[name] - expected).flatten())
            return {name: torch.cat(error).norm() for name, error in errors.items()}

        plain, ours = errors_of("plain"), errors_of(form)
        for name, error in plain.items():
            assert ours[name] <= 1.5 * error, f"{name}: {ours[name]:.4g} off, plain operations {error:.4g}"

    @EVERY_FORM
    @BOTH_FAMILIES
    def test_keeps_no_other_copy_of_the_weights(self, model_class, form):
        model = dropping_model(model_class, kernels=form, n_experts=1).float()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(**batch_of(model)).last_hidden_state
        nodes = nodes_of(hidden, "_FusedFeedForwardBackward") + nodes_of(hidden, "_FusedExpertsBackward")
        assert len(nodes) == model.config.num_hidden_layers
        kept = [tensor for node in nodes for tensor in node.saved_tensors if tensor is not None]
        places = {parameter.data_ptr() for parameter in model.parameters()}
        shapes = {parameter.shape for parameter in model.parameters()}
        weights = [tensor for tensor in kept if tensor.shape in shapes]
        assert weights and all(tensor.data_ptr() in places for tensor in weights)


class TestFrozen:
    """No product is computed for a gradient that nobody wants."""

    def products_backward(self, function, inputs, wanted):
        """How many matrix products the backward pass computes for gradients of the inputs with these numbers, whose
        values it compares with those of a backward pass for all."""
        (everything,) = self.gradients_of(function, inputs, range(len(inputs)))[1:]
        count, gradients = self.gradients_of(function, inputs, wanted)
        for number, gradient in zip(wanted, gradients, strict=True):
            torch.testing.assert_close(gradient, everything[number], **EXACT)
        return count

    def gradients_of(self, function, inputs, wanted):
        inputs = [tensor.detach().requires_grad_(number in wanted) for number, tensor in enumerate(inputs)]
        output = function(*inputs)
        with CountedProducts() as products:
            gradients = torch.autograd.grad(output, [inputs[number] for number in wanted], some_numbers(*output.shape))
        return products.count, gradients

    @pytest.mark.parametrize(
        "wanted, products",
        [
            ([0], 1 + 2),  # from the output to width F; from there through each of two kernel groups
            ([1], 1),
            ([2], 1),
            ([3, 6], 1 + 2),
            ([0, 1, 4], 1 + 1 + 2 + 2),
            (range(7), 1 + 1 + 2 + 2),
        ],
        ids=str,
    )
    def test_feed_forward(self, wanted, products, monkeypatch):
        monkeypatch.setattr(kernels, "TOKENS_PER_BLOCK", 8)
        inputs = random_inputs((2, 4, 4), (4, 8), (4,), *((4, 1, size) for size in (5, 3)), (4,), (4,))
        assert self.products_backward(feed_forward_of("gelu", recompute=False), inputs, wanted) == products

    @pytest.mark.parametrize(
        "wanted, products", [([0], 2), ([1], 2), ([2], 2), ([3], 1), ([4], 1), ([0, 1], 3), (range(5), 4)], ids=str
    )
    def test_experts(self, wanted, products):
        inputs = random_inputs((4, 2), (2, 5, 2), (2, 5), (2, 2, 5), (2, 2))
        experts = experts_of([4, 0], recompute=False)
        assert self.products_backward(experts, inputs, wanted) == products

    @pytest.mark.parametrize("wanted, products", [([0], 2), ([1], 2), ([2], 2), ([0, 1], 3), (range(3), 4)], ids=str)
    def test_attention(self, wanted, products):
        def attention(*inputs):
            return reversible_residual_attention(*inputs, None, None, 0.0)[0]

        assert self.products_backward(attention, random_inputs(*[(2, 3, 1, 2)] * 3), wanted) == products


class CountedProducts(TorchDispatchMode):
    """How many matrix products run."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += any(name in function.__name__ for name in ("addmm", "baddbmm", "mm.", "bmm."))
        return function(*args, **(kwargs or {}))


class _Anew(torch.autograd.Function):
    """A function that can be differentiated again and again, because every backward pass runs it anew."""

    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx, *gradients):
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = ctx.function(*inputs)
        return None, *torch.autograd.grad(outputs, inputs, [gradient.clone() for gradient in gradients])


def random_inputs(*shapes):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def feed_forward_of(activation, recompute):
    """`mixed_kernel_feed_forward` of two slices, two kernel groups and two texts of 4 tokens, as a function of tensors
    alone."""
    token_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])[..., None].double()

    def feed_forward(hidden, dense_weight, dense_bias, *parameters):
        convolutions = [SimpleNamespace(weight=w, bias=b) for w, b in zip(parameters[:2], parameters[2:], strict=True)]
        dense = SimpleNamespace(weight=dense_weight, bias=dense_bias)
        return kernels.mixed_kernel_feed_forward(hidden, token_mask, convolutions, dense, 2, activation, recompute)

    return feed_forward


def experts_of(counts, recompute):
    """`expert_feed_forward` as a function of tensors alone."""
    return lambda tokens, *weights: kernels.expert_feed_forward(tokens, counts, *weights, "gelu", recompute)


class TestSecondDerivatives:
    """Refused, also where the incoming gradient is a constant and nothing would tell that results are not."""

    def assert_refused(self, output, inputs):
        with pytest.raises(RuntimeError, match='^second derivatives.*kernels="plain"$'):
            torch.autograd.grad(output, inputs, torch.ones_like(output), create_graph=True)

    @pytest.mark.parametrize("recompute", [False, True])
    def test_feed_forward(self, recompute):
        inputs = random_inputs((2, 4, 4), (4, 8), (4,), *((4, 1, size) for size in (5, 3)), (4,), (4,))
        self.assert_refused(feed_forward_of("gelu", recompute)(*inputs), inputs)

    @pytest.mark.parametrize("recompute", [False, True])
    def test_experts(self, recompute):
        inputs = random_inputs((6, 2), (3, 5, 2), (3, 5), (3, 2, 5), (3, 2))
        self.assert_refused(experts_of([2, 0, 4], recompute)(*inputs), inputs)

    def test_attention(self):
        inputs = random_inputs(*[(2, 3, 2, 2)] * 3)
        self.assert_refused(reversible_residual_attention(*inputs, None, None, 0.0)[0], inputs)

    @BOTH_FAMILIES
    def test_plain_operations_have_them(self, model_class):
        model = dropping_model(model_class, kernels="plain")
        parameter = model.stack.attentions[0].o_proj.weight
        (first,) = torch.autograd.grad(weighted_sum(model(**batch_of(model))), parameter, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), parameter)
        assert second.abs().max() > 1e-3

    def test_dropout_has_them(self):
        hidden = some_numbers(5, 4).requires_grad_()
        assert torch.autograd.gradgradcheck(lambda each: TestDropout().drop(0.3, each).square(), hidden)


class TestAgainstFiniteDifferences:
    @pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
    def test_attention_over_two_layers(self, padded):
        mask = torch.tensor([[1, 1, 1], [1, 0, 1]]).bool()[:, None, None] if padded else None

        def two_layers(attention, *inputs):
            first, *_, scores = attention(*inputs[:3], None, mask, 0.0)
            second, *_, scores = attention(*inputs[3:], scores, mask, 0.0)
            return first, second, scores

        inputs = random_inputs(*[(2, 3, 2, 2)] * 6)
        plain = two_layers(residual_attention, *inputs)
        for ours, theirs in zip(two_layers(reversible_residual_attention, *inputs), plain, strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)
        assert torch.autograd.gradcheck(lambda *inputs: two_layers(residual_attention, *inputs), inputs)
        assert torch.autograd.gradcheck(
            lambda *inputs: _Anew.apply(lambda *inputs: two_layers(reversible_residual_attention, *inputs), *inputs),
            inputs,
        )

    @pytest.mark.parametrize("recompute", [False, True])
    @pytest.mark.parametrize("activation", ["gelu", "swish"])
    @pytest.mark.parametrize("tokens_per_block", [3, 8])
    def test_feed_forward(self, tokens_per_block, activation, recompute, monkeypatch):
        monkeypatch.setattr(kernels, "TOKENS_PER_BLOCK", tokens_per_block)
        inputs = random_inputs((2, 4, 4), (4, 8), (4,), *((4, 1, size) for size in (5, 3)), (4,), (4,))
        assert torch.autograd.gradcheck(feed_forward_of(activation, recompute), inputs)

    @pytest.mark.parametrize("recompute", [False, True])
    @pytest.mark.parametrize("counts", [[2, 0, 4], [0, 6, 0]], ids=str)
    def test_experts(self, counts, recompute, monkeypatch):
        monkeypatch.setattr(kernels, "TOKENS_PER_BLOCK", 4)
        inputs = random_inputs((6, 2), (3, 5, 2), (3, 5), (3, 2, 5), (3, 2))
        assert torch.autograd.gradcheck(experts_of(counts, recompute), inputs)


class TestConvolution:
    def convolution(self, n_experts=3, num_heads=2, channels=8):
        config = SimpleNamespace(n_experts=n_experts, num_heads=num_heads, hidden_size=12, kernel_size=5)
        torch.manual_seed(1)
        return MixedKernelConvolution(config, channels).double()

    @pytest.mark.parametrize("length", [1, 2, 6])
    @pytest.mark.parametrize("n_experts, num_heads", [(1, 1), (3, 2), (2, 3)])
    def test_equals_a_loop(self, n_experts, num_heads, length):
        channels = 6
        module = self.convolution(n_experts, num_heads, channels)
        hidden = some_numbers(2, length, 12)
        width, rows = 12 // n_experts // num_heads, channels // num_heads
        expected = torch.zeros(2, length, n_experts, channels, dtype=torch.float64)
        for text in range(2):
            for token in range(length):
                for number in range(n_experts):
                    for group, convolution in enumerate(module.convolutions):
                        first = number * 12 // n_experts + group * width
                        for row in range(rows):
                            weight = convolution.weight[number * rows + row]  # [width, taps]
                            total = convolution.bias[number * rows + row].item()
                            for tap in range(weight.shape[1]):
                                place = token + tap - weight.shape[1] // 2
                                if 0 <= place < length:
                                    total += (weight[:, tap] @ hidden[text, place, first : first + width]).item()
                            expected[text, token, number, group * rows + row] = total
        torch.testing.assert_close(module(hidden, None), expected, **EXACT)

    @pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
    @pytest.mark.parametrize("recompute", [False, True])
    def test_feed_forward_is_made_of_it(self, recompute, padded):
        module, dense = self.convolution(), nn.Linear(24, 12).double()
        hidden = some_numbers(3, 7, 12)
        token_mask = batch_of(SimpleNamespace(config=SimpleNamespace(vocab_size=9, type_vocab_size=2)))
        token_mask = token_mask["attention_mask"][..., None].double() if padded else None
        expected = dense(nn.functional.gelu(module(hidden, token_mask).flatten(2)))
        output = kernels.mixed_kernel_feed_forward(
            hidden, token_mask, module.convolutions, dense, 3, "gelu", recompute
        )
        torch.testing.assert_close(output, expected, **EXACT)

    def test_any_memory_layout(self):
        module, dense = self.convolution(), nn.Linear(24, 12).double()
        hidden = some_numbers(7, 3, 12)
        for form in (hidden.transpose(0, 1), some_numbers(3, 12, 7).transpose(1, 2), hidden[:1].expand(3, 3, 12)):
            arguments = (module.convolutions, dense, 3, "gelu", False)
            strided, contiguous = form.detach().requires_grad_(), form.contiguous().requires_grad_()
            outputs = [kernels.mixed_kernel_feed_forward(each, None, *arguments) for each in (strided, contiguous)]
            torch.testing.assert_close(*outputs, **EXACT)
            upstream = some_numbers(12, *form.shape[:2]).permute(1, 2, 0)
            gradients = [
                torch.autograd.grad(output, each, upstream)[0]
                for output, each in zip(outputs, (strided, contiguous), strict=True)
            ]
            torch.testing.assert_close(*gradients, **EXACT)


class TestDropout:
    SIZE = 200_001  # not a multiple of 4

    def drop(self, probability, hidden, seed=0):
        torch.manual_seed(seed)
        return Dropout(probability)(hidden)

    @pytest.mark.parametrize("probability", [0.001, 0.1, 0.25, 0.5, 0.9])
    def test_share_and_scaling(self, probability):
        dropped = self.drop(probability, torch.ones(self.SIZE, dtype=torch.float64))
        kept = (dropped != 0).double()
        sigma = (probability * (1 - probability) / self.SIZE) ** 0.5
        assert abs(kept.mean().item() - (1 - probability)) < 5 * sigma
        assert abs(dropped.mean().item() - 1) < 5 * sigma / (1 - probability)
        exact = 65536 / (65536 - round(probability * 65536))
        assert dropped.unique().tolist() == [0, exact]
        assert exact == pytest.approx(1 / (1 - probability), rel=1e-4)

    @pytest.mark.parametrize("apart", [1, 2, 3, 4, 7])
    def test_neighbours_are_independent(self, apart):
        """Four of them come from one random integer."""
        kept = (self.drop(0.3, torch.ones(self.SIZE)) != 0).double()
        together = (kept[apart:] * kept[:-apart]).mean().item()
        assert abs(together - 0.7**2) < 5 * (0.49 * 0.51 / self.SIZE) ** 0.5 * 2

    def test_seed(self):
        hidden = torch.ones(30, 11)
        first, again, other = self.drop(0.3, hidden), self.drop(0.3, hidden), self.drop(0.3, hidden, seed=1)
        assert torch.equal(first, again) and not torch.equal(first, other)
        dropout = Dropout(0.3)
        assert not torch.equal(dropout(hidden), dropout(hidden)), "two draws are not alike"

    def test_is_the_identity_outside_of_training_and_at_zero(self):
        hidden = torch.ones(9)
        assert Dropout(0.3).eval()(hidden) is hidden
        assert Dropout(0.0)(hidden) is hidden

    def test_a_tiny_probability_drops_nothing(self):
        hidden = torch.ones(self.SIZE)
        assert torch.equal(self.drop(1e-7, hidden), hidden)

    def test_a_large_probability_keeps_expectation(self):
        dropped = self.drop(0.9999, torch.ones(self.SIZE, dtype=torch.float64))
        assert dropped.isfinite().all() and 0 < (dropped != 0).sum() < 100

    @pytest.mark.parametrize("shape", [(0,), (), (1,), (3, 5), (2, 3, 7)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_shapes_and_types(self, shape, dtype):
        hidden = torch.ones(shape, dtype=dtype)
        dropped = self.drop(0.5, hidden)
        assert dropped.shape == shape and dropped.dtype == dtype
        assert set(dropped.flatten().tolist()) <= {0.0, 2.0}

    def test_probability_one_drops_everything(self):
        hidden = torch.ones(9, requires_grad=True)
        dropped = self.drop(1.0, hidden)
        dropped.sum().backward()
        assert not dropped.any() and not hidden.grad.any()
        queries, keys, values = (tensor.detach() for tensor in random_inputs(*[(2, 3, 2, 2)] * 3))
        for attention in (residual_attention, reversible_residual_attention):
            assert not attention(queries, keys, values, None, None, dropout=1.0)[0].any()

    def test_elsewhere_than_on_a_cpu_is_torchs_own(self, monkeypatch):
        """The meta device has no random numbers."""
        monkeypatch.setattr(kernels, "dropout_factors", None)
        hidden = torch.ones(3, 5, device="meta", requires_grad=True)
        Dropout(0.3)(hidden).sum().backward()
        assert hidden.grad.shape == hidden.shape
        residual_attention(*[torch.ones(2, 3, 2, 2, device="meta")] * 3, None, None, dropout=0.3)

    def test_seeds_are_drawn_on_the_cpu(self):
        with torch.device("meta"):
            assert isinstance(kernels.draw_seed(), int)

    def test_training_on_the_meta_device(self):
        model = dropping_model(MixLMModel, kernels="auto").to("meta")
        batch = {name: tensor.to("meta") for name, tensor in batch_of(model).items()}
        model(**batch).last_hidden_state.sum().backward()
        assert all(parameter.grad is not None for parameter in model.stack.parameters())

    def test_gradient_is_the_factor_times_what_comes(self):
        hidden, upstream = some_numbers(13, 6).T.requires_grad_(), some_numbers(6, 13)
        dropped = self.drop(0.3, hidden)
        factors = (dropped / hidden).detach()
        for _ in range(2):  # the mask can be drawn any number of times
            (gradient,) = torch.autograd.grad(dropped, hidden, upstream, retain_graph=True)
            torch.testing.assert_close(gradient, factors * upstream, rtol=1e-15, atol=0)

    def test_gradients_of_torch_func(self):
        hidden = torch.randn(4, 6)
        torch.manual_seed(0)
        gradient = torch.func.grad(lambda inputs: Dropout(0.5)(inputs).square().sum())(hidden)
        torch.manual_seed(0)
        dropped = Dropout(0.5)(hidden)
        assert torch.equal(gradient, torch.where(dropped == 0, 0, 2 * dropped * 2))

    def test_keeps_no_mask(self):
        saved = []
        hidden = torch.ones(4, 4, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
            dropped = Dropout(0.3)(hidden)
        assert not saved and not dropped.grad_fn.saved_tensors

    def test_factors_follow_the_generator(self):
        like = torch.empty(5, 5)
        generator = kernels.seeded(3, like.device)
        first, second = dropout_factors(like, 0.5, generator), dropout_factors(like, 0.5, generator)
        assert not torch.equal(first, second)
        assert torch.equal(first, dropout_factors(like, 0.5, kernels.seeded(3, like.device)))


def kept_bytes(model, length):
    """The bytes that a forward pass keeps for its backward pass, parameters aside."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    ids = torch.ones(2, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert output.last_hidden_state.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


def nodes_of(tensor, name):
    """All nodes of the graph behind `tensor` whose class has this name."""
    waiting, seen = [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return [node for node in seen if type(node).__name__ == name]


class TestWhatIsKept:
    def per_layer(self, form, length):
        def kept(layers):
            model = dropping_model(
                MixLMModel, num_hidden_layers=layers, layer_group=layers, kernels=form, max_position_embeddings=64
            )
            return kept_bytes(model, length)

        two, four, six = kept(2), kept(4), kept(6)
        assert four - two == six - four, "every layer keeps the same"
        return (four - two) // 2

    @EVERY_FORM
    def test_grows_with_the_length_and_not_with_its_square(self, form):
        """Beside what does not depend on the length: the weights of the keys, in another order."""
        short, middle, long = (self.per_layer(form, length) for length in (16, 32, 48))
        assert long - middle == middle - short > 0

    def test_plain_operations_keep_the_square(self):
        """The measure sees it."""
        short, middle, long = (self.per_layer("plain", length) for length in (16, 32, 48))
        rows, maps, size = 2, 3, 8
        assert (long - middle) - (middle - short) >= 2 * rows * maps * 16**2 * size

    def test_lean_keeps_nothing_of_the_width_of_the_feed_forward(self):
        width = 36
        assert self.per_layer("fused", 16) - self.per_layer("lean", 16) == 2 * 16 * width * 8

    @EVERY_FORM
    @BOTH_FAMILIES
    def test_one_buffer_of_scores_for_all_layers(self, model_class, form):
        model = dropping_model(model_class, kernels=form, residual_attention=True)
        hidden = model(**batch_of(model)).last_hidden_state
        nodes = nodes_of(hidden, "_ReversibleAttentionBackward")
        assert len(nodes) == model.config.num_hidden_layers
        assert len({node.scores.untyped_storage().data_ptr() for node in nodes}) == 1
        hidden.sum().backward()
        assert all(node.scores is None for node in nodes)


class TestScoresAreUsedUp:
    @EVERY_FORM
    @BOTH_FAMILIES
    def test_by_a_backward_pass(self, model_class, form):
        model = dropping_model(model_class, kernels=form)
        loss = weighted_sum(model(**batch_of(model)))
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match='used up by an earlier backward pass.*kernels="plain"'):
            loss.backward()

    @BOTH_FAMILIES
    def test_plain_operations_go_back_twice(self, model_class):
        model = dropping_model(model_class, kernels="plain")
        loss = weighted_sum(model(**batch_of(model)))
        loss.backward(retain_graph=True)
        first = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        loss.backward()
        assert_same_gradients({name: p.grad for name, p in model.named_parameters()}, first)

    @pytest.mark.parametrize("layer", [1, 2, 3])
    @EVERY_FORM
    @BOTH_FAMILIES
    def test_by_later_layers_that_the_loss_does_not_see(self, model_class, form, layer):
        """The buffer holds their scores too: an error, not a wrong gradient."""
        model = dropping_model(model_class, num_hidden_layers=4)
        inner = []
        feed_forward = model.stack.feed_forwards[layer - 1]
        feed_forward.register_forward_hook(lambda module, inputs, outputs: inner.append(outputs[0]))
        batch = batch_of(model)
        model.config.kernels = form
        model(**batch)
        with pytest.raises(RuntimeError, match='inner layers alone.*kernels="plain"'):
            inner[0].sum().backward()
        model.config.kernels = "plain"
        model(**batch)
        inner[1].sum().backward()

    @pytest.mark.parametrize("part", ["layers", "attentions"])
    @EVERY_FORM
    @BOTH_FAMILIES
    def test_a_hook_that_sees_scores_makes_the_model_plain(self, model_class, form, part):
        model = dropping_model(model_class, num_hidden_layers=4, kernels=form)
        inner = []
        getattr(model.stack, part)[1].register_forward_hook(lambda module, inputs, outputs: inner.append(outputs[0]))
        model(**batch_of(model))
        inner[0].sum().backward()


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_16_bits_are_added_up_in_32_over_many_blocks(recompute):
    """In bfloat16 itself nothing of a block would be added any more from some hundreds on."""
    shapes = {"up_weight": (1, 8, 4), "up_bias": (1, 8), "down_weight": (1, 4, 8), "down_bias": (1, 4)}
    weights = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    weights["up_bias"].zero_()
    for weight in weights.values():
        weight.requires_grad_()
    tokens = torch.ones(1000, 4, dtype=torch.bfloat16)
    kernels.expert_feed_forward(tokens, [1000], **weights, activation="relu", recompute=recompute).sum().backward()
    for name, expected in {"up_weight": 4000, "up_bias": 4000, "down_weight": 4000, "down_bias": 1000}.items():
        assert (weights[name].grad == expected).all(), name
