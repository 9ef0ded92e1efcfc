"""Which kernels run: what is chosen, and that a module which somebody has changed does what they say."""

import copy

import accelerate
import pytest
import torch
from kernel_forms import (
    BOTH_FAMILIES,
    EVERY_FORM,
    EXACT,
    FORMS,
    assert_forms_agree,
    assert_same_gradients,
    batch_of,
    calls_of,
    dropping_model,
    some_numbers,
    weighted_sum,
)
from oracle import small_model
from torch import nn
from torch.nn.utils import parametrize, prune

from mixlm import MixLMForMaskedLM, MixLMForRetrieval, MixLMModel, MixLMSwitchForMaskedLM, MixLMSwitchModel
from mixlm.kernels import choose_kernels

pytestmark = pytest.mark.usefixtures("blocks_end_inside_texts")


class TestChoice:
    @pytest.mark.parametrize(
        "setting, length, plain_needed, fused, recompute",
        [
            ("auto", 512, False, True, False),
            ("auto", 1023, False, True, False),
            ("auto", 1024, False, True, True),
            ("auto", 4096, False, True, True),
            ("plain", 8, False, False, False),
            ("plain", 4096, False, False, False),
            ("fused", 8, False, True, False),
            ("fused", 4096, False, True, False),
            ("lean", 8, False, True, True),
            ("lean", 4096, False, True, True),
            *((setting, length, True, False, False) for setting in ("auto", "fused", "lean") for length in (8, 4096)),
        ],
    )
    def test_on_a_cpu(self, setting, length, plain_needed, fused, recompute):
        assert choose_kernels(setting, torch.empty(1, length, 1), plain_needed) == (fused, recompute)

    @pytest.mark.parametrize(
        "width, length, fused", [(383, 511, False), (384, 511, True), (383, 512, True), (384, 8, True)]
    )
    def test_small_steps_are_not_worth_it(self, width, length, fused):
        hidden = torch.empty(1, length, width)
        assert choose_kernels("auto", hidden, False) == (fused, False)
        assert choose_kernels("fused", hidden, False).fused

    @pytest.mark.parametrize("length", [8, 4096])
    def test_on_other_devices_torchs_own_operations(self, length):
        hidden = torch.empty(1, length, 1, device="meta")
        assert not choose_kernels("auto", hidden, False).fused
        assert choose_kernels("fused", hidden, False).fused

    @pytest.mark.parametrize("form, fused", [("auto", 0), ("plain", 0), ("fused", 1), ("lean", 1)])
    def test_is_what_the_configuration_says(self, form, fused, monkeypatch):
        counts = calls_of(
            monkeypatch, "reversible_residual_attention", "residual_attention", "mixed_kernel_feed_forward"
        )
        model = small_model(MixLMModel, kernels=form)
        model(**batch_of(model))
        layers = model.config.num_hidden_layers
        assert list(counts.values()) == [fused * layers, (1 - fused) * layers, fused * layers]

    @pytest.mark.parametrize("by_configuration", [False, True], ids=["argument", "configuration"])
    @pytest.mark.parametrize("form", ["auto", *FORMS])
    @BOTH_FAMILIES
    def test_attentions_have_a_gradient(self, model_class, form, by_configuration):
        def loss_of(output):
            return sum((each * some_numbers(*each.shape)).sum() for each in output.attentions)

        wish = {} if by_configuration else {"output_attentions": True}
        model = dropping_model(model_class, attn_implementation="eager")
        model.config.output_attentions = by_configuration
        assert_forms_agree(model, batch_of(model), forms=[form], loss_of=loss_of, **wish)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("form", ["auto", *FORMS])
    @pytest.mark.parametrize("model_class", [MixLMForMaskedLM, MixLMSwitchForMaskedLM])
    def test_gradient_checkpointing(self, model_class, form, use_reentrant):
        model = dropping_model(model_class)
        checkpointed = copy.deepcopy(model)
        checkpointed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        batch = batch_of(model)
        results = []
        for each in (model, checkpointed):
            each.config.kernels = form
            torch.manual_seed(5)
            each(**batch, labels=batch["input_ids"]).loss.backward()
            results.append({name: parameter.grad for name, parameter in each.named_parameters()})
        assert_same_gradients(results[1], results[0])

    @pytest.mark.parametrize("form", FORMS)
    def test_gradient_checkpointing_of_every_second_layer_of_two_towers(self, form):
        """transformers counts on through both: of three layers each, the second tower's first is not among them."""
        model = small_model(MixLMForRetrieval, num_hidden_layers=3, two_towers=True, kernels=form).train()
        checkpointed = copy.deepcopy(model)
        checkpointed.activation_checkpointing_enable(every_n_layers=2)
        marks = [
            [each.gradient_checkpointing for each in tower.stack.layers]
            for tower in (checkpointed.encoder, checkpointed.context_encoder)
        ]
        assert marks[0][0] != marks[1][0]
        batch = batch_of(model)
        of_contexts = {f"context_{name}": batch[name] for name in ("input_ids", "attention_mask")}
        results = []
        for each in (model, checkpointed):
            output = each(**{name: batch[name] for name in ("input_ids", "attention_mask")}, **of_contexts)
            (output.embeddings * output.context_embeddings).sum().backward()
            results.append({name: parameter.grad for name, parameter in each.named_parameters()})
        assert_same_gradients(results[1], results[0])

    def test_layers_that_were_asked_for_once_change_no_later_pass(self, monkeypatch):
        """transformers leaves its hooks behind."""
        model = small_model(MixLMModel, kernels="fused")
        batch = batch_of(model)
        model(**batch, output_hidden_states=True)
        counts = calls_of(monkeypatch, "reversible_residual_attention", "mixed_kernel_feed_forward")
        model(**batch)
        assert list(counts.values()) == [model.config.num_hidden_layers] * 2

    @pytest.mark.parametrize("form", ["auto", *FORMS])
    @BOTH_FAMILIES
    def test_the_configuration_can_be_changed_for_the_next_model(self, model_class, form):
        model = small_model(model_class, kernels=form)
        before = model(**batch_of(model)).last_hidden_state
        model.config.act_fn = "relu"
        torch.testing.assert_close(model(**batch_of(model)).last_hidden_state, before, **EXACT)

    @pytest.mark.parametrize("form", ["auto", *FORMS])
    @BOTH_FAMILIES
    def test_gradients_of_torch_func(self, model_class, form):
        model = small_model(model_class, kernels=form)
        batch = batch_of(model)
        parameters = dict(model.named_parameters())

        def loss(parameters):
            return weighted_sum(torch.func.functional_call(model, parameters, (), batch))

        found = torch.func.grad(loss)(parameters)
        loss(parameters).backward()
        assert_same_gradients(found, {name: parameter.grad for name, parameter in parameters.items()})

    def test_compiled_training(self):
        """A compiler sees torch's own operations, without a break; the gradients are those of the fused form."""
        torch._dynamo.reset()
        model = small_model(MixLMModel, num_hidden_layers=2, kernels="auto").train()
        batch = batch_of(model)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        results = []
        for form in (model, compiled):
            model.zero_grad()
            weighted_sum(form(**batch)).backward()
            results.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert_same_gradients(results[1], results[0])


class Doubled(nn.Linear):
    """A layer as an adapter would put it in the place of another: the same weights, another result."""

    def forward(self, hidden):
        return 2 * super().forward(hidden)


class Scaled(torch.Tensor):
    """A weight as quantisation or sharding would put it in the place of another."""


class Adapted(nn.Module):
    """A layer with a low-rank update beside it, as LoRA has (arXiv:2106.09685)."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        rows, columns = base.weight.flatten(1).shape
        self.up, self.down = (nn.Parameter(some_numbers(*shape)) for shape in ((rows, 1), (1, columns)))

    def update(self):
        return (self.up @ self.down).view_as(self.base.weight)

    def forward(self, inputs):
        if isinstance(self.base, nn.Linear):
            return self.base(inputs) + nn.functional.linear(inputs, self.update())
        padding, groups = self.base.padding, self.base.groups
        return self.base(inputs) + nn.functional.conv1d(inputs, self.update(), padding=padding, groups=groups)


class TestChangedModules:
    """A feed-forward that somebody has changed does what they say, in every form."""

    EVERY_PLACE = pytest.mark.parametrize("place", ["dense", "convolution", "convolution.convolutions.1"])

    def model(self, form):
        return small_model(MixLMModel, kernels=form, num_hidden_layers=2, layer_group=2)

    def output(self, model):
        return model(**batch_of(model)).last_hidden_state

    def assert_honoured(self, form, change, changes_output=True):
        plain, model = self.model("plain"), self.model(form)
        before = self.output(model)
        change(plain.stack.feed_forwards[0]), change(model.stack.feed_forwards[0])
        after = self.output(model)
        torch.testing.assert_close(after, self.output(plain), **EXACT)
        assert torch.allclose(before, after) != changes_output

    @EVERY_FORM
    def test_subclass(self, form):
        def change(feed_forward):
            old = feed_forward.dense
            feed_forward.dense = Doubled(old.in_features, old.out_features).double()
            feed_forward.dense.load_state_dict(old.state_dict())

        self.assert_honoured(form, change)

    @EVERY_PLACE
    @EVERY_FORM
    def test_replaced_forward(self, form, place):
        def change(feed_forward):
            module = feed_forward.get_submodule(place)
            forward = module.forward
            module.forward = lambda *inputs: 2 * forward(*inputs)

        self.assert_honoured(form, change)

    @EVERY_PLACE
    @EVERY_FORM
    def test_hooks(self, form, place):
        def double_output(feed_forward):
            feed_forward.get_submodule(place).register_forward_hook(lambda module, inputs, output: 2 * output)

        def double_input(feed_forward):
            feed_forward.get_submodule(place).register_forward_pre_hook(
                lambda module, inputs: (2 * inputs[0], *inputs[1:])
            )

        self.assert_honoured(form, double_output)
        self.assert_honoured(form, double_input)

    @pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d])
    @pytest.mark.parametrize(
        "register, hook",
        [
            ("register_module_forward_hook", lambda module, inputs, output: 2 * output),
            ("register_module_forward_pre_hook", lambda module, inputs: (2 * inputs[0],)),
        ],
    )
    @EVERY_FORM
    def test_hooks_of_all_modules(self, form, register, hook, kind):
        plain, model = self.model("plain"), self.model(form)
        before = self.output(model)
        register = getattr(nn.modules.module, register)
        handle = register(lambda module, *given: hook(module, *given) if isinstance(module, kind) else None)
        try:
            after, expected = self.output(model), self.output(plain)
        finally:
            handle.remove()
        torch.testing.assert_close(after, expected, **EXACT)
        assert not torch.allclose(after, before)

    @pytest.mark.parametrize(
        "register", ["register_module_full_backward_hook", "register_module_full_backward_pre_hook"]
    )
    @pytest.mark.filterwarnings("ignore:.*ackward hook")
    @EVERY_FORM
    def test_backward_hooks_of_all_modules(self, form, register):
        model, seen = self.model(form), set()
        handle = getattr(nn.modules.module, register)(lambda module, *_: seen.add(module))
        try:
            self.output(model).sum().backward()
        finally:
            handle.remove()
        feed_forward = model.stack.feed_forwards[0]
        assert {feed_forward.dense, *feed_forward.convolution.convolutions} <= seen

    @pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
    @EVERY_FORM
    def test_backward_hooks(self, form, register):
        model, calls = self.model(form), []
        getattr(model.stack.feed_forwards[0].dense, register)(lambda *_: calls.append(1))
        self.output(model).sum().backward()
        assert len(calls) == model.config.num_hidden_layers

    @pytest.mark.parametrize("place", ["dense", "convolution.convolutions.1"])
    @EVERY_FORM
    def test_changed_weights(self, form, place):
        class Double(nn.Module):
            def forward(self, weight):
                return 2 * weight

        def parametrized(feed_forward):
            parametrize.register_parametrization(feed_forward.get_submodule(place), "weight", Double())

        def pruned(feed_forward):
            prune.l1_unstructured(feed_forward.get_submodule(place), "weight", amount=0.5)

        def without_bias(feed_forward):
            feed_forward.get_submodule(place).register_parameter("bias", None)

        for change in (parametrized, pruned, without_bias):
            self.assert_honoured(form, change)

    @pytest.mark.parametrize("form", ["plain", *FORMS])
    @pytest.mark.parametrize(
        "model_class, place",
        [
            (MixLMModel, "attentions.0.key.convolutions.0"),
            (MixLMModel, "attentions.1.o_proj"),
            (MixLMModel, "feed_forwards.0.convolution.convolutions.1"),
            (MixLMModel, "feed_forwards.1.dense"),
            (MixLMSwitchModel, "attentions.0.query"),
            (MixLMSwitchModel, "feed_forwards.0.router"),
        ],
        ids=lambda value: value if isinstance(value, str) else value.__name__,
    )
    def test_adapter(self, model_class, place, form):
        """The same output as with the update added to the weight, and a gradient for the adapter."""
        model = small_model(model_class, kernels=form, num_hidden_layers=2)
        merged = copy.deepcopy(model)
        adapted = Adapted(model.stack.get_submodule(place))
        model.stack.set_submodule(place, adapted)
        weight = merged.stack.get_submodule(place).weight
        weight.data += adapted.update().detach()
        ours, expected = (each(**batch_of(each)).last_hidden_state for each in (model, merged))
        torch.testing.assert_close(ours, expected, **EXACT)
        (ours * some_numbers(*ours.shape)).sum().backward()
        (expected * some_numbers(*ours.shape)).sum().backward()
        torch.testing.assert_close(adapted.up.grad, weight.grad.flatten(1) @ adapted.down.detach().T, **EXACT)
        assert adapted.up.grad.abs().max() > 1e-3

    @pytest.mark.parametrize("form", ["auto", "plain", *FORMS])
    @BOTH_FAMILIES
    def test_offloading(self, model_class, form):
        """Between calls, the weights are on the meta device."""
        model = small_model(model_class, kernels=form)
        batch = batch_of(model)
        with torch.no_grad():
            expected = model(**batch).last_hidden_state
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
            assert all(parameter.is_meta for parameter in model.parameters())
            torch.testing.assert_close(model(**batch).last_hidden_state, expected, **EXACT)

    @EVERY_FORM
    def test_weights_of_another_type(self, form, monkeypatch):
        counts = calls_of(monkeypatch, "mixed_kernel_feed_forward")
        model = self.model(form)
        expected = self.output(model)
        assert counts["mixed_kernel_feed_forward"] == 2
        dense = model.stack.feed_forwards[0].dense
        dense.weight = nn.Parameter(dense.weight.detach().as_subclass(Scaled))
        torch.testing.assert_close(self.output(model).as_subclass(torch.Tensor), expected, **EXACT)
        assert counts["mixed_kernel_feed_forward"] == 2
