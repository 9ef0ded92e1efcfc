"""Both encoders: equal to their plain form, blind to padding, and sharing, routing, saving as the design says."""

import copy
import math
import re
from itertools import product

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from kernel_forms import BOTH_FAMILIES
from oracle import Oracle, in_batch_cross_entropy, mean_cross_entropy, random_batch, small_model
from safetensors import safe_open
from torch import nn

from mixlm import (
    MixLMConfig,
    MixLMForMaskedLM,
    MixLMForPreTraining,
    MixLMForQuestionAnswering,
    MixLMForRetrieval,
    MixLMModel,
    MixLMSwitchConfig,
    MixLMSwitchForMaskedLM,
    MixLMSwitchForPreTraining,
    MixLMSwitchForQuestionAnswering,
    MixLMSwitchForRetrieval,
    MixLMSwitchModel,
)
from mixlm.modeling_mixlm import kernel_sizes
from mixlm.modeling_switch import Router, router_loss

HEADS = [
    (model_class, fields)
    for family in (
        (MixLMForMaskedLM, MixLMForQuestionAnswering, MixLMForRetrieval, MixLMForPreTraining),
        (
            MixLMSwitchForMaskedLM,
            MixLMSwitchForQuestionAnswering,
            MixLMSwitchForRetrieval,
            MixLMSwitchForPreTraining,
        ),
    )
    for model_class, fields in (
        (family[0], {}),
        (family[1], {}),
        (family[2], {"pooler": "decoder"}),
        (family[2], {"pooler": "mean"}),
        (family[2], {"pooler": "cls"}),
        (family[3], {"pretraining_objective": "sop"}),
        (family[3], {"pretraining_objective": "ict", "pooler": "decoder"}),
        (family[3], {"pretraining_objective": "ict", "pooler": "mean"}),
    )
]
EVERY_HEAD = pytest.mark.parametrize(
    "model_class, fields",
    HEADS,
    ids=["-".join([model_class.__name__, *fields.values()]) for model_class, fields in HEADS],
)
# The router and the losses are computed in float32, also in a float64 model.
ROUTED = {"rtol": 1e-5, "atol": 2e-6}
EXACT = {"rtol": 1e-9, "atol": 1e-10}


def tolerance(model):
    return EXACT if model.config.model_type == "mixlm" else ROUTED


def inputs_of(model, batch):
    """The batch for a model in the form its loss needs: labels on every third token, and a context for ICT."""
    config, kind = model.config, type(model).__name__
    real = batch["attention_mask"].bool()
    rows, length = real.shape
    place = torch.arange(length).expand(rows, length)
    labels = torch.where(real & (place % 3 == 1), (place * 7 + torch.arange(rows)[:, None]) % config.vocab_size, -100)
    batch = dict(batch)
    if "QuestionAnswering" in kind:
        batch.update(start_positions=torch.arange(rows) % 2, end_positions=real.sum(dim=1) - 1)
    elif "Retrieval" in kind or ("PreTraining" in kind and config.pretraining_objective == "ict"):
        batch["context_input_ids"] = (batch["input_ids"] + 5) % config.vocab_size
        batch["context_attention_mask"] = batch["attention_mask"]
    if "MaskedLM" in kind or "PreTraining" in kind:
        batch["labels"] = labels
        if "PreTraining" in kind and config.pretraining_objective == "sop":
            batch["sentence_order_label"] = torch.arange(rows) % 2
        elif "PreTraining" in kind:
            batch["context_labels"] = labels
    return batch


def oracle_loss(model, batch, training):
    """The loss of any head, from the plain form."""
    oracle, mask = Oracle(model), batch["attention_mask"]
    encoded = oracle.encode(batch["input_ids"], mask, batch["token_type_ids"], training)
    hidden = encoded.last_hidden_state
    aux_losses, losses = [encoded.aux_loss], []
    if "start_positions" in batch:
        logits = oracle.linear(hidden, "qa_outputs")
        logits = torch.where(mask.bool()[..., None], logits, torch.full_like(logits, -1e30))
        start = mean_cross_entropy(logits[..., 0], batch["start_positions"])
        end = mean_cross_entropy(logits[..., 1], batch["end_positions"])
        losses.append((start + end) / 2)
    mlm_logits, mlm_labels = [], []
    if "labels" in batch:
        mlm_logits.append(oracle.mlm_logits(hidden).flatten(0, 1))
        mlm_labels.append(batch["labels"].flatten())
    if "sentence_order_label" in batch:
        losses.append(mean_cross_entropy(oracle.sop_logits(hidden), batch["sentence_order_label"]))
    if "context_input_ids" in batch:
        context_mask = batch["context_attention_mask"]
        context = oracle.encode(batch["context_input_ids"], context_mask, training=training)
        aux_losses.append(context.aux_loss)
        contexts = oracle.pooled(context.last_hidden_state, context_mask)
        losses.append(in_batch_cross_entropy(oracle.pooled(hidden, mask), contexts))
        if "context_labels" in batch:
            mlm_logits.append(oracle.mlm_logits(context.last_hidden_state).flatten(0, 1))
            mlm_labels.append(batch["context_labels"].flatten())
    if mlm_logits:
        losses.append(mean_cross_entropy(torch.cat(mlm_logits), torch.cat(mlm_labels)))
    if training and aux_losses[0] is not None:
        losses.append(sum(aux_losses) / len(aux_losses))
    return sum(losses)


def gradients(model, loss):
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for name, parameter, gradient in zip(names, parameters, found, strict=True)
    }


def assert_equal_to_oracle(model, lengths, padded, training=False):
    batch = random_batch(model.config, lengths, seed=3)
    if not padded:
        del batch["attention_mask"]
    model.train(training)
    output = model(**batch, output_hidden_states=True, output_router_logits=True)
    expected = Oracle(model).encode(**batch, training=training)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    assert len(output.hidden_states) == len(expected.hidden_states) == model.config.num_hidden_layers + 1
    for index, (ours, theirs) in enumerate(zip(output.hidden_states, expected.hidden_states, strict=True)):
        torch.testing.assert_close(
            ours[real], theirs[real], **tolerance(model), msg=lambda text, index=index: f"after layer {index}: {text}"
        )
    torch.testing.assert_close(output.last_hidden_state[real], expected.last_hidden_state[real], **tolerance(model))
    if expected.aux_loss is None:
        assert output.aux_loss is None
    else:
        torch.testing.assert_close(output.aux_loss.double(), expected.aux_loss, **ROUTED)
        for ours, theirs in zip(output.router_logits, expected.router_logits, strict=True):
            torch.testing.assert_close(ours[real], theirs[real], **ROUTED)


class TestKernelSizes:
    @pytest.mark.parametrize(
        "largest, groups, expected",
        [
            (9, 4, [9, 7, 5, 3]),  # as many groups as odd sizes
            (5, 2, [5, 3]),
            (3, 1, [3]),
            (9, 1, [9]),
            (1, 1, [1]),
            (1, 3, [1, 1, 1]),
            (3, 4, [3, 3, 3, 3]),
            (9, 2, [9, 3]),  # fewer groups: evenly spread from the largest to 3
            (11, 3, [11, 7, 3]),
            (15, 4, [15, 11, 7, 3]),
            (5, 4, [5, 5, 3, 3]),  # more groups: repeated
            (7, 6, [7, 7, 5, 5, 3, 3]),
        ],
    )
    def test_hand_computed(self, largest, groups, expected):
        assert kernel_sizes(largest, groups) == expected

    @pytest.mark.parametrize("largest, groups", product((1, 3, 5, 7, 9, 15, 31), (1, 2, 3, 4, 5, 7, 8, 16)))
    def test_properties(self, largest, groups):
        sizes = kernel_sizes(largest, groups)
        assert len(sizes) == groups
        assert sizes[0] == largest
        assert all(size % 2 == 1 for size in sizes)
        assert sizes == sorted(sizes, reverse=True)
        if groups > 1 and largest >= 3:
            assert sizes[-1] == 3
            assert len(set(sizes)) == min(groups, (largest - 1) // 2), "no size twice before every size was used"

    def test_are_the_kernels_of_the_weights(self):
        model = small_model(MixLMModel, kernel_size=9, num_heads=4, n_experts=2, hidden_size=24, ff_dim=40)
        convolutions = [
            *model.stack.attentions[0].key.convolutions,
            *model.stack.feed_forwards[0].convolution.convolutions,
        ]
        assert [convolution.weight.shape[-1] for convolution in convolutions] == [9, 7, 5, 3] * 2


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
class TestEqualsThePlainForm:
    """Hidden states of every layer, in float64."""

    @pytest.mark.parametrize("residual_attention", [True, False], ids=["residual", "plain"])
    @pytest.mark.parametrize("shared_parameters", ["all", "ffn", "attention"])
    @pytest.mark.parametrize("layer_group", [1, 2, 4])
    @pytest.mark.parametrize("ln_pos", [0, 1], ids=["preln", "postln"])
    @BOTH_FAMILIES
    def test_structure(self, model_class, ln_pos, layer_group, shared_parameters, residual_attention, padded):
        model = small_model(
            model_class,
            ln_pos=ln_pos,
            layer_group=layer_group,
            shared_parameters=shared_parameters,
            residual_attention=residual_attention,
        )
        assert_equal_to_oracle(model, [7, 4], padded)

    @pytest.mark.parametrize("act_fn", ["gelu", "relu", "swish"])
    @pytest.mark.parametrize("final_layer_norm", [True, False], ids=["finalnorm", "nofinalnorm"])
    @pytest.mark.parametrize("ln_pos", [0, 1], ids=["preln", "postln"])
    @BOTH_FAMILIES
    def test_activation_and_final_norm(self, model_class, ln_pos, final_layer_norm, act_fn, padded):
        model = small_model(
            model_class, ln_pos=ln_pos, final_layer_norm=final_layer_norm, act_fn=act_fn, num_hidden_layers=2
        )
        assert_equal_to_oracle(model, [6, 1, 3], padded)

    @pytest.mark.parametrize(
        "kernel_size, num_heads, n_experts",
        [
            (1, 1, 1),
            (1, 2, 3),
            (3, 1, 2),
            (3, 4, 1),
            (5, 1, 4),
            (5, 2, 2),
            (5, 4, 3),
            (9, 4, 1),
            (9, 3, 2),
            (15, 2, 6),
        ],
    )
    @pytest.mark.parametrize("ln_pos", [0, 1], ids=["preln", "postln"])
    def test_mixlm_sizes(self, ln_pos, kernel_size, num_heads, n_experts, padded):
        model = small_model(
            MixLMModel,
            ln_pos=ln_pos,
            kernel_size=kernel_size,
            num_heads=num_heads,
            n_experts=n_experts,
            num_hidden_layers=2,
            ff_dim=48,
        )
        assert_equal_to_oracle(model, [9, 5, 2], padded)

    @pytest.mark.parametrize("eager", [True, False], ids=["eager", "sdpa"])
    @BOTH_FAMILIES
    def test_attention_interface(self, model_class, eager, padded):
        model = small_model(model_class, residual_attention=False)
        model.set_attn_implementation("eager" if eager else "sdpa")
        assert_equal_to_oracle(model, [7, 4], padded)

    @pytest.mark.parametrize("router_scaling", ["probability", "straight-through"])
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize(
        "num_heads, n_experts, capacity_factor", [(1, 1, 0.5), (2, 2, 1), (8, 3, 0.7), (4, 9, 1.2)]
    )
    @pytest.mark.parametrize("ln_pos", [0, 1], ids=["preln", "postln"])
    def test_switch_routing(self, ln_pos, num_heads, n_experts, capacity_factor, training, router_scaling, padded):
        model = small_model(
            MixLMSwitchModel,
            ln_pos=ln_pos,
            num_heads=num_heads,
            n_experts=n_experts,
            capacity_factor=capacity_factor,
            router_scaling=router_scaling,
            num_hidden_layers=2,
        )
        assert_equal_to_oracle(model, [9, 5], padded, training)


@EVERY_HEAD
class TestHeadsEqualThePlainForm:
    @pytest.mark.parametrize("ln_pos, layer_group, training", [(0, 1, False), (1, 2, True)])
    def test_loss_and_gradients(self, model_class, fields, ln_pos, layer_group, training):
        model = small_model(model_class, **fields, ln_pos=ln_pos, layer_group=layer_group, num_hidden_layers=2).train(
            training
        )
        batch = inputs_of(model, random_batch(model.config, [7, 5]))
        loss, expected = model(**batch).loss, oracle_loss(model, batch, training)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
        theirs = gradients(model, expected)
        for name, ours in gradients(model, loss).items():
            scale = max(theirs[name].abs().max().item(), 1e-2)
            torch.testing.assert_close(
                ours, theirs[name], rtol=0, atol=1e-5 * scale, msg=lambda text, name=name: f"{name}: {text}"
            )


def assert_same_where_real(padded, alone, real, tolerance):
    """Every field of two outputs is equal; of [batch, length, ...] the part at real tokens is, which is `alone`'s."""
    assert padded.keys() == alone.keys()
    for name in padded:
        pairs = [(padded[name], alone[name])]
        if isinstance(padded[name], tuple):
            pairs = list(zip(padded[name], alone[name], strict=True))
        for ours, theirs in pairs:
            if ours.shape != theirs.shape:
                assert ours.shape[:2] == real.shape, name
                ours, theirs = ours[real], theirs[real[:, : theirs.shape[1]]]
            torch.testing.assert_close(ours, theirs, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@EVERY_HEAD
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "structure",
    [
        {"ln_pos": 0, "residual_attention": True},
        {"ln_pos": 1, "residual_attention": False, "layer_group": 2},
    ],
    ids=["preln-residual", "postln-plain"],
)
class TestPaddingChangesNothing:
    """A batch alone, and the same batch with more padding that holds garbage."""

    def batches(self, model, lengths, padded_to):
        padded = random_batch(model.config, lengths, padded_to=padded_to)
        unpadded = {name: tensor[:, : max(lengths)] for name, tensor in padded.items()}
        return inputs_of(model, padded), inputs_of(model, unpadded)

    def test_outputs_and_losses(self, model_class, fields, structure, training):
        model = small_model(model_class, **fields, **structure, num_hidden_layers=2).train(training)
        padded, unpadded = self.batches(model, [6, 6], padded_to=11)
        real = padded["attention_mask"].bool()
        without_mask = {name: tensor for name, tensor in unpadded.items() if "attention_mask" not in name}
        options = {"output_hidden_states": True, "output_router_logits": True}
        alone = model(**without_mask, **options)
        assert_same_where_real(model(**unpadded, **options), alone, real, tolerance(model))
        assert_same_where_real(model(**padded, **options), alone, real, tolerance(model))

    def test_inference(self, model_class, fields, structure, training):
        model = small_model(model_class, **fields, **structure, num_hidden_layers=2).train(training)
        padded = random_batch(model.config, [6, 6], padded_to=11)
        real = padded["attention_mask"].bool()
        alone = model(padded["input_ids"][:, :6], token_type_ids=padded["token_type_ids"][:, :6])
        output = model(**padded)
        assert output.get("loss") is None
        assert_same_where_real(output, alone, real, tolerance(model))

    def test_mixed_lengths(self, model_class, fields, structure, training):
        """Each text of a batch of different lengths is what it is alone."""
        model = small_model(model_class, **fields, **structure, num_hidden_layers=2).train(training)
        lengths = [3, 9, 1, 6]
        batch = random_batch(model.config, lengths, padded_to=10)
        together = model(**batch)
        for row, length in enumerate(lengths):
            alone = model(
                batch["input_ids"][row : row + 1, :length],
                token_type_ids=batch["token_type_ids"][row : row + 1, :length],
            )
            for name, theirs in alone.items():
                if theirs.ndim > 0:  # the auxiliary loss is a mean over rows
                    ours = together[name][row : row + 1]
                    ours = ours[:, :length] if ours.shape != theirs.shape else ours
                    torch.testing.assert_close(ours, theirs, **tolerance(model))

    def test_gradients(self, model_class, fields, structure, training):
        model = small_model(model_class, **fields, **structure, num_hidden_layers=2).train(training)
        padded, unpadded = self.batches(model, [6, 4], padded_to=11)
        alone = gradients(model, model(**unpadded).loss)
        for name, gradient in gradients(model, model(**padded).loss).items():
            torch.testing.assert_close(
                gradient, alone[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


@BOTH_FAMILIES
class TestPadding:
    def test_huge_embeddings_in_the_padding(self, model_class):
        model = small_model(model_class, num_hidden_layers=2)
        embeddings = torch.randn(2, 8, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        mask = torch.tensor([[1] * 5 + [0] * 3] * 2)
        expected = model(inputs_embeds=embeddings[:, :5]).last_hidden_state
        embeddings[:, 5:] *= 1e12
        output = model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(output[:, :5], expected, **tolerance(model))

    @pytest.mark.parametrize("residual_attention", [True, False])
    def test_is_not_attended_to(self, model_class, residual_attention):
        model = small_model(model_class, residual_attention=residual_attention)
        model.set_attn_implementation("eager")
        batch = random_batch(model.config, [7, 4])
        attentions = model(**batch, output_attentions=True).attentions
        expected = Oracle(model).encode(**batch).attentions
        assert len(attentions) == len(expected) == 4
        for ours, theirs in zip(attentions, expected, strict=True):
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours.sum(dim=-1), torch.ones_like(ours[..., 0]))
            assert (ours[1, ..., 4:] == 0).all()
            torch.testing.assert_close(ours[0], theirs[0], **tolerance(model))
            torch.testing.assert_close(ours[1, :, :4], theirs[1, :, :4], **tolerance(model))

    @pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32, torch.float32])
    def test_mask_of_any_type(self, model_class, mask_dtype):
        model = small_model(model_class, num_hidden_layers=2)
        batch = random_batch(model.config, [7, 4])
        expected = model(**batch).last_hidden_state
        batch["attention_mask"] = batch["attention_mask"].to(mask_dtype)
        torch.testing.assert_close(model(**batch).last_hidden_state, expected)

    def test_mask_of_other_numbers(self, model_class):
        """Padding is 0, and what is not 0 is a token."""
        model = small_model(model_class, num_hidden_layers=2)
        batch = random_batch(model.config, [7, 4])
        expected = model(**batch).last_hidden_state
        batch["attention_mask"] = 2 * batch["attention_mask"]
        torch.testing.assert_close(model(**batch).last_hidden_state, expected)

    def test_a_row_of_padding_alone_does_no_harm(self, model_class):
        model = small_model(model_class, num_hidden_layers=2).train()
        batch = random_batch(model.config, [5, 5])
        batch["attention_mask"][1] = 0
        output = model(**batch)
        assert output.last_hidden_state.isfinite().all()
        output.last_hidden_state[0].sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@BOTH_FAMILIES
class TestRowsAreIndependent:
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_order_and_company(self, model_class, training):
        model = small_model(model_class).train(training)
        batch = random_batch(model.config, [8, 5, 7, 2])
        hidden = model(**batch).last_hidden_state
        order = torch.tensor([2, 0, 3])
        other = model(**{name: tensor[order] for name, tensor in batch.items()}).last_hidden_state
        torch.testing.assert_close(other, hidden[order], **tolerance(model))

    def test_a_text_never_looks_into_another(self, model_class):
        model = small_model(model_class).train()
        batch = random_batch(model.config, [6, 6])
        embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        hidden = model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).last_hidden_state
        (gradient,) = torch.autograd.grad(hidden[0].square().sum(), embeddings)
        assert gradient[0].abs().sum() > 0
        assert (gradient[1] == 0).all()


@BOTH_FAMILIES
class TestInputs:
    def test_defaults(self, model_class):
        model = small_model(model_class, num_hidden_layers=2)
        ids = random_batch(model.config, [6, 6])["input_ids"]
        expected = model(
            ids, torch.ones_like(ids), token_type_ids=torch.zeros_like(ids), position_ids=torch.arange(6)[None]
        )
        torch.testing.assert_close(model(ids).last_hidden_state, expected.last_hidden_state, **tolerance(model))
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids))
        torch.testing.assert_close(embedded.last_hidden_state, expected.last_hidden_state, **tolerance(model))

    def test_positions_matter(self, model_class):
        model = small_model(model_class, num_hidden_layers=2)
        ids = random_batch(model.config, [6, 6])["input_ids"]
        shifted = model(ids, position_ids=torch.arange(6)[None] + 2).last_hidden_state
        assert not torch.allclose(shifted, model(ids).last_hidden_state)

    def test_tuple(self, model_class):
        model = small_model(model_class, num_hidden_layers=2)
        ids = random_batch(model.config, [6])["input_ids"]
        torch.testing.assert_close(model(ids, return_dict=False)[0], model(ids).last_hidden_state)

    def test_too_long(self, model_class):
        model = small_model(model_class, num_hidden_layers=2)
        with pytest.raises(ValueError, match="21 tokens.*max_position_embeddings is 20"):
            model(torch.zeros(1, 21, dtype=torch.long))

    def test_no_token(self, model_class):
        model = small_model(model_class, num_hidden_layers=2)
        with pytest.raises(ValueError, match="^the input has no token; give every text one at least, such as"):
            model(torch.zeros(1, 0, dtype=torch.long))
        assert model(torch.zeros(0, 3, dtype=torch.long)).last_hidden_state.shape == (0, 3, model.config.hidden_size)

    def test_mask_of_another_shape(self, model_class):
        model = small_model(model_class, num_hidden_layers=2)
        with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 5\), expected \(2, 6\)"):
            model(torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 5))

    def test_a_wrong_field_is_refused_when_a_model_is_loaded(self, model_class, tmp_path):
        """transformers sets it in a configuration that has been made already."""
        small_model(model_class).save_pretrained(tmp_path)
        with pytest.raises(StrictDataclassError, match="layer_group=3 does not divide num_hidden_layers=4"):
            model_class.from_pretrained(tmp_path, layer_group=3)

    def test_no_input_or_two(self, model_class):
        model = small_model(model_class, num_hidden_layers=2)
        ids = torch.zeros(1, 3, dtype=torch.long)
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model()
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(ids, inputs_embeds=model.get_input_embeddings()(ids))


@EVERY_HEAD
def test_initial_values(model_class, fields):
    sizes = {"vocab_size": 100, "hidden_size": 48, "num_hidden_layers": 1, "ff_dim": 96, "max_position_embeddings": 40}
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**sizes, num_heads=2, n_experts=3, initializer_range=0.05, **fields))
    for name, parameter in model.state_dict().items():
        if name == "pooler.weight":
            assert (parameter == 1 / 32).all()
        elif "norm" in name.lower() and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert float(parameter.std()) == pytest.approx(0.05, rel=0.25) and abs(parameter.mean()) < 0.02, name


@EVERY_HEAD
@pytest.mark.parametrize("ln_pos, shared_parameters", [(0, "all"), (1, "ffn"), (1, "attention")])
def test_every_parameter_gets_a_gradient(model_class, fields, ln_pos, shared_parameters):
    model = small_model(
        model_class, **fields, ln_pos=ln_pos, layer_group=2, shared_parameters=shared_parameters
    ).train()
    model(**inputs_of(model, random_batch(model.config, [9, 7, 8]))).loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient for {missing}"
    # A bias that moves all the scores of a softmax alike has a gradient of 0; a weight has none such.
    zero = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad.abs().max() == 0 and not name.endswith("bias")
    ]
    assert not zero, f"the gradient is 0 for {zero}"
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


class TestSharedLayers:
    def expected_parameters(self, config, layer_group, shared_parameters):
        """By formula, from the layers that have weights of their own."""
        width, ff_dim, experts, layers = config.hidden_size, config.ff_dim, config.n_experts, config.num_hidden_layers
        if config.model_type == "mixlm":

            def convolution(outputs):
                # Of each slice, group g maps D / G channels to outputs / E / G ones, by 5 or 3 taps and a bias.
                assert config.num_heads == 2 and config.kernel_size == 5
                from_channels, to_channels = width // experts // 2, outputs // experts // 2
                return experts * (to_channels * from_channels * (5 + 3) + 2 * to_channels)

            attention = convolution(width) + width * width + width
            feed_forward = convolution(ff_dim) + ff_dim * width + width
        else:
            attention = 4 * (width * width + width)
            feed_forward = experts * (2 * width * ff_dim + ff_dim + width) + width * experts + experts
        norms = 4 * width
        embeddings = (config.vocab_size + config.max_position_embeddings + config.type_vocab_size + 2) * width
        groups = layers // layer_group
        count = {
            "all": (groups, groups, groups),
            "ffn": (layers, groups, layers),
            "attention": (groups, layers, layers),
        }[shared_parameters]
        return embeddings + count[0] * attention + count[1] * feed_forward + count[2] * norms + 2 * width

    @pytest.mark.parametrize("shared_parameters", ["all", "ffn", "attention"])
    @pytest.mark.parametrize("layer_group", [1, 3, 12])
    @BOTH_FAMILIES
    def test_parameter_count(self, model_class, layer_group, shared_parameters):
        model = small_model(
            model_class, num_hidden_layers=12, layer_group=layer_group, shared_parameters=shared_parameters
        )
        expected = self.expected_parameters(model.config, layer_group, shared_parameters)
        assert model.num_parameters() == expected
        assert sum(tensor.numel() for tensor in model.state_dict().values()) == expected, "nothing is stored twice"

    @pytest.mark.parametrize("shared_parameters", ["all", "ffn", "attention"])
    @BOTH_FAMILIES
    def test_a_shared_weight_is_that_of_all_its_layers(self, model_class, shared_parameters):
        """A model that shares is one that does not and has the same weights in all layers of a group."""
        shared = small_model(model_class, layer_group=2, shared_parameters=shared_parameters)
        apart = small_model(model_class, layer_group=1)
        names = {
            "all": ("attentions", "feed_forwards", "layers"),
            "ffn": ("feed_forwards",),
            "attention": ("attentions",),
        }[shared_parameters]

        def spread(only_layers=range(4)):
            weights = shared.state_dict()
            for name, tensor in apart.state_dict().items():
                parts = name.split(".")
                layer = int(parts[2]) if parts[0] == "stack" and parts[2].isdigit() else None
                if layer is not None and layer not in only_layers:
                    continue
                if layer is not None and parts[1] in names:
                    parts[2] = str(layer // 2)
                tensor.copy_(weights[".".join(parts)])

        batch = random_batch(shared.config, [6, 6])
        for part in names:
            spread()
            before = shared(**batch).last_hidden_state
            torch.testing.assert_close(apart(**batch).last_hidden_state, before, **tolerance(shared))
            with torch.no_grad():
                for parameter in getattr(shared.stack, part)[1].parameters():  # of layers 2 and 3
                    parameter.mul_(1.5)
            after = shared(**batch).last_hidden_state
            assert not torch.allclose(after, before)
            for half in (2, 3):
                spread(only_layers=[half])
                equal = torch.allclose(apart(**batch).last_hidden_state, after, rtol=1e-5, atol=1e-5)
                assert equal == (half == 3), f"{part}: layers up to {half} were changed"

    @BOTH_FAMILIES
    def test_gradient_is_the_sum_over_its_layers(self, model_class):
        shared = small_model(model_class, num_hidden_layers=2, layer_group=2)
        apart = small_model(model_class, num_hidden_layers=2, layer_group=1)
        weights = shared.state_dict()
        apart.load_state_dict(
            {name: weights[re.sub(r"^(stack\.\w+)\.1\.", r"\1.0.", name)] for name in apart.state_dict()}
        )
        batch = random_batch(shared.config, [6, 6])
        ours = gradients(shared, shared(**batch).last_hidden_state.sin().sum())
        theirs = gradients(apart, apart(**batch).last_hidden_state.sin().sum())
        name = "stack.attentions.0.o_proj.weight"
        total = theirs[name] + theirs[name.replace("s.0.", "s.1.")]
        torch.testing.assert_close(ours[name], total, rtol=1e-5, atol=1e-5)


def one_switch_layer(**fields):
    """A Switch of one pre-LN layer without final norm, and its inputs: five tokens that all go to expert 0."""
    model = small_model(
        MixLMSwitchModel, num_hidden_layers=1, n_experts=2, final_layer_norm=False, capacity_factor=1.2, **fields
    )
    router = model.stack.feed_forwards[0].router
    with torch.no_grad():
        router.weight.zero_()
        router.bias.copy_(torch.tensor([2.0, 0.0]))
    return model, random_batch(model.config, [5, 5])["input_ids"]


def without_experts(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.stack.feed_forwards[0].experts.parameters():
            parameter.zero_()
    return model


class TestSwitch:
    def test_capacity(self):
        """ceil(1.2 x 5 / 2) = 3 of the five tokens fit; the last two pass through the residual alone."""
        model, ids = one_switch_layer()
        residual = without_experts(model)(ids).last_hidden_state
        difference = (model.train()(ids).last_hidden_state - residual).abs().amax(dim=-1)
        assert (difference > 1e-3).tolist() == [[True, True, True, False, False]] * 2
        assert (difference[:, 3:] == 0).all()

    def test_capacity_counts_real_tokens_alone(self):
        """ceil(1.2 x 3 / 2) = 2 of three real tokens; five places of padding add nothing."""
        model, _ = one_switch_layer()
        batch = random_batch(model.config, [3], padded_to=8)
        residual = without_experts(model)(**batch).last_hidden_state
        difference = (model.train()(**batch).last_hidden_state - residual).abs().amax(dim=-1)
        assert (difference > 1e-3).tolist() == [[True, True] + [False] * 6]

    @pytest.mark.parametrize(
        "capacity_factor, tokens, n_experts, capacity",
        [
            (1.2, 5, 2, 3),
            (1.2, 10, 4, 3),
            (1.2, 25, 5, 6),  # 6 exactly, and more by a rounding error
            (1.2, 45, 6, 9),
            (1.1, 100, 10, 11),
            (1, 8, 4, 2),
            (0.01, 4, 4, 1),
            (100.0, 7, 2, 350),
        ],
    )
    def test_capacity_is_exact(self, capacity_factor, tokens, n_experts, capacity):
        model = small_model(
            MixLMSwitchModel,
            num_hidden_layers=1,
            n_experts=n_experts,
            capacity_factor=capacity_factor,
            max_position_embeddings=tokens,
            final_layer_norm=False,
        )
        with torch.no_grad():
            model.stack.feed_forwards[0].router.weight.zero_()
        ids = torch.arange(tokens)[None] % 31
        residual = without_experts(model)(ids).last_hidden_state
        difference = (model.train()(ids).last_hidden_state - residual).abs().amax(dim=-1)
        assert (difference > 0).sum() == min(capacity, tokens)

    def test_evaluation_drops_nothing(self):
        model, ids = one_switch_layer()
        residual = without_experts(model)(ids).last_hidden_state
        assert ((model(ids).last_hidden_state - residual).abs().amax(dim=-1) > 1e-3).all()

    def test_padding_is_never_routed(self):
        model = small_model(MixLMSwitchModel)
        routed = []
        for feed_forward in model.stack.feed_forwards:
            feed_forward.experts.register_forward_hook(lambda module, args, output: routed.append(len(args[0])))
            feed_forward.register_forward_hook(lambda module, args, output: routed.append(output[0]))
        batch = random_batch(model.config, [7, 2, 4], padded_to=9)
        model(**batch)
        assert routed[::2] == [7 + 2 + 4] * 4
        for transformed in routed[1::2]:
            assert (transformed[batch["attention_mask"] == 0] == 0).all()

    @pytest.mark.parametrize("router_scaling", ["probability", "straight-through"])
    def test_router_scaling(self, router_scaling):
        """p = softmax([2, 0])[0] for every token; straight-through has its gradient, not its value."""
        model, ids = one_switch_layer(router_scaling=router_scaling)
        residual = without_experts(model)(ids).last_hidden_state
        weights = {name: weight.detach() for name, weight in model.state_dict().items()}
        experts = "stack.feed_forwards.0.experts."
        oracle = Oracle(model)
        normal = oracle.norm(residual, "stack.layers.0.feed_forward_norm")
        up = oracle.act_fn(normal @ weights[f"{experts}up_weight"][0].T + weights[f"{experts}up_bias"][0])
        plain = up @ weights[f"{experts}down_weight"][0].T + weights[f"{experts}down_bias"][0]
        probability = math.exp(2) / (math.exp(2) + 1)
        expected = residual + plain * (probability if router_scaling == "probability" else 1)
        output = model(ids).last_hidden_state
        torch.testing.assert_close(output, expected, **ROUTED)

        output.sum().backward()
        slope = plain.sum() * (probability * (1 - probability) if router_scaling == "probability" else 1 - probability)
        gradient = model.stack.feed_forwards[0].router.bias.grad
        torch.testing.assert_close(gradient, torch.stack([slope, -slope]), rtol=1e-5, atol=1e-6)

    def test_load_balancing_loss_of_a_uniform_router_is_one(self):
        model = small_model(MixLMSwitchModel, n_experts=3, router_aux_loss_coef=1.0, router_z_loss_coef=0.0)
        with torch.no_grad():
            for feed_forward in model.stack.feed_forwards:
                feed_forward.router.weight.zero_()
                feed_forward.router.bias.zero_()
        aux_loss = model.train()(**random_batch(model.config, [7, 4])).aux_loss
        assert aux_loss.item() == pytest.approx(4 * 1.0)  # 4 layers x 3 experts x (1 x 1/3 + 0 x 1/3 + 0 x 1/3)

    def test_aux_loss_of_a_constant_router(self):
        """All tokens prefer expert 0 with p = softmax([2, 0])[0]: balance = 2 p, z = log(e² + 1)²."""
        model, ids = one_switch_layer(router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
        probability = math.exp(2) / (math.exp(2) + 1)
        expected = 0.5 * 2 * probability + 0.25 * math.log(math.exp(2) + 1) ** 2
        assert model(ids, output_router_logits=True).aux_loss.item() == pytest.approx(expected, rel=1e-5)
        assert model.train()(ids).aux_loss.item() == pytest.approx(expected, rel=1e-5), "dropped tokens count too"

    def test_an_expert_without_tokens_has_a_gradient_of_zero(self):
        model, ids = one_switch_layer()
        model.train()(ids).last_hidden_state.square().sum().backward()
        for name, parameter in model.stack.feed_forwards[0].experts.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad[0].abs().sum() > 0, name
            assert (parameter.grad[1] == 0).all(), name

    def test_splitting_the_batch_changes_nothing(self):
        """The mean over micro-batches is the whole, for the auxiliary loss and for its gradient."""
        model = small_model(MixLMSwitchModel, router_aux_loss_coef=1.0, router_z_loss_coef=0.1).train()
        batch = random_batch(model.config, [9, 3, 5, 7])
        whole = model(**batch).aux_loss
        halves = [
            model(**{name: tensor[rows] for name, tensor in batch.items()}).aux_loss
            for rows in (slice(0, 2), slice(2, 4))
        ]
        torch.testing.assert_close(sum(halves) / 2, whole, rtol=1e-6, atol=1e-6)
        parts = gradients(model, sum(halves) / 2)
        for name, gradient in gradients(model, whole).items():
            torch.testing.assert_close(gradient, parts[name], rtol=1e-5, atol=1e-6)

    def test_router_logits_on_request(self):
        model = small_model(MixLMSwitchModel)
        batch = random_batch(model.config, [5, 5])
        assert model(**batch).router_logits is None
        assert [logits.shape for logits in model(**batch, output_router_logits=True).router_logits] == [(2, 5, 3)] * 4
        model.config.output_router_logits = True
        assert len(model(**batch).router_logits) == 4

    def test_aux_loss_in_training_and_with_the_router_logits(self):
        """An evaluation's loss is that of the task, and a pipeline can cut the output into texts."""
        model = small_model(MixLMSwitchForMaskedLM)
        batch = random_batch(model.config, [5, 5])
        batch["labels"] = batch["input_ids"]
        output, asked = model(**batch), model(**batch, output_router_logits=True)
        assert output.aux_loss is None and output.loss == output.mlm_loss
        assert asked.loss == asked.mlm_loss + asked.aux_loss > output.loss
        assert model.train()(**batch).aux_loss > 0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_aux_loss_is_not_rounded_by_autocast(self, dtype):
        logits = torch.randn(4, 50, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
        real = torch.ones(4, 50)
        real[1, 30:] = 0
        expected = router_loss(logits, real, 1.0, 0.1)
        with torch.autocast("cpu", dtype=dtype):
            loss = router_loss(logits, real, 1.0, 0.1)
        assert loss == expected
        assert torch.equal(*(torch.autograd.grad(each, logits)[0] for each in (loss, expected)))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_choice_of_an_expert_is_not_rounded(self, dtype):
        torch.manual_seed(0)
        router, hidden = Router(24, 3), torch.randn(2, 50, 24)
        with torch.autocast("cpu", dtype=dtype):
            found = router(hidden)
        assert found.dtype == torch.float32 and torch.equal(found, router(hidden))
        assert router.to(dtype)(hidden.to(dtype)).dtype == torch.float32

    @pytest.mark.filterwarnings("ignore")
    def test_a_trace_routes_the_tokens_it_is_given(self):
        """And not as those it was recorded with."""
        model = small_model(MixLMSwitchModel, num_hidden_layers=2, return_dict=False)
        recorded, other = (random_batch(model.config, [9, 5], seed=seed) for seed in (0, 1))
        names = ("input_ids", "attention_mask")
        with torch.no_grad():
            traced = torch.jit.trace(model, tuple(recorded[name] for name in names), strict=False)
            inputs = [other[name] for name in names]
            torch.testing.assert_close(traced(*inputs)[0], model(*inputs)[0], **tolerance(model))


@EVERY_HEAD
class TestSaving:
    def test_load_gives_the_same_outputs(self, model_class, fields, tmp_path):
        model = small_model(model_class, **fields, layer_group=2, shared_parameters="ffn")
        model.save_pretrained(tmp_path)
        assert (tmp_path / "model.safetensors").is_file()
        loaded, report = model_class.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
        assert not any(report.values()), report
        assert not loaded.training
        assert loaded.config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(tmp_path)} | {
            name: value for name, value in loaded.config.to_dict().items() if name in ("dtype", "transformers_version")
        }
        batch = inputs_of(model, random_batch(model.config, [7, 4]))
        ours, theirs = loaded(**batch), model(**batch)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-12, atol=1e-12)

    def test_bare_encoder_of_it(self, model_class, fields, tmp_path):
        model = small_model(model_class, **fields)
        model.save_pretrained(tmp_path)
        bare_class = model_class.base_model_class
        bare, report = bare_class.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
        assert not report["missing_keys"]
        batch = random_batch(model.config, [7, 4])
        expected = model.encoder(**batch).last_hidden_state
        torch.testing.assert_close(bare(**batch).last_hidden_state, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "model_class", [MixLMForMaskedLM, MixLMForPreTraining, MixLMSwitchForMaskedLM, MixLMSwitchForPreTraining]
)
def test_decoder_stays_tied(model_class, tmp_path):
    model = small_model(model_class)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert "encoder.embeddings.word_embeddings.weight" in names
    assert "mlm_head.decoder.weight" not in names
    loaded = model_class.from_pretrained(tmp_path)
    assert loaded.mlm_head.decoder.weight is loaded.encoder.embeddings.word_embeddings.weight
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@EVERY_HEAD
class TestPrecisionAndDropout:
    @pytest.mark.parametrize("residual_attention", [True, False], ids=["residual", "plain"])
    def test_bfloat16(self, model_class, fields, residual_attention):
        model = small_model(model_class, **fields, residual_attention=residual_attention).bfloat16().train()
        batch = inputs_of(model, random_batch(model.config, [7, 4]))
        output = model(**batch)
        assert output.loss.isfinite()
        for name, tensor in output.items():
            assert tensor.isfinite().all(), name
        output.loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.isfinite().all(), name

    def test_dropout_is_active_in_training_alone(self, model_class, fields):
        model = small_model(model_class, **fields, dropout_prob=0.5, num_hidden_layers=2)
        batch = random_batch(model.config, [7, 4])
        first, second = model(**batch), model(**batch)
        for name, tensor in first.items():
            torch.testing.assert_close(tensor, second[name], rtol=0, atol=0)
        torch.manual_seed(0)
        first = model.train()(**batch)
        second = model(**batch)
        name = next(name for name in first if name != "aux_loss")
        assert not torch.allclose(first[name], second[name])


@pytest.mark.parametrize("residual_attention", [True, False], ids=["residual", "plain"])
@BOTH_FAMILIES
def test_every_dropout_is_used(model_class, residual_attention):
    """Embeddings, attention probabilities and feed-forward: with any one of them alone, two passes differ."""
    model = small_model(
        model_class, num_hidden_layers=1, residual_attention=residual_attention, capacity_factor=100.0
    ).train()
    batch = random_batch(model.config, [7, 4])
    dropouts = {name: module for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert len(dropouts) == 3
    torch.manual_seed(0)
    assert torch.equal(model(**batch).last_hidden_state, model(**batch).last_hidden_state)
    for name, module in dropouts.items():
        module.p = 0.5
        assert not torch.equal(model(**batch).last_hidden_state, model(**batch).last_hidden_state), name
        module.p = 0.0


@pytest.mark.parametrize("config_class", [MixLMConfig, MixLMSwitchConfig])
def test_families_have_the_same_heads(config_class):
    """HEADS above misses none of the public classes."""
    import mixlm

    tested = {model_class.__name__ for model_class, _ in HEADS if model_class.config_class is config_class}
    public = {
        name
        for name in mixlm.__all__
        if "For" in name and getattr(getattr(mixlm, name), "config_class", None) is config_class
    }
    assert tested == public
