"""What transformers and torch offer on top of a model, where the common suite does not compare numbers."""

import copy

import pytest
import torch
from small_models import SIZES, batch, build

from mixlm import (
    MixLMForMaskedLM,
    MixLMForPreTraining,
    MixLMForQuestionAnswering,
    MixLMForRetrieval,
    MixLMModel,
    MixLMSwitchForMaskedLM,
    MixLMSwitchModel,
)

HEADS = (MixLMModel, MixLMForPreTraining, MixLMForMaskedLM, MixLMForQuestionAnswering, MixLMForRetrieval)


@pytest.mark.parametrize("model_class", [MixLMModel, MixLMSwitchModel])
def test_attention_implementations_agree(model_class):
    model, inputs = build(model_class, residual_attention=False), batch()
    real = inputs["attention_mask"].bool()
    outputs = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        with torch.no_grad():
            outputs[implementation] = model(**inputs).last_hidden_state[real]
    torch.testing.assert_close(outputs["sdpa"], outputs["eager"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("residual_attention", [True, False])
@pytest.mark.parametrize("layer_group", [1, 2])
@pytest.mark.parametrize("model_class", [MixLMForMaskedLM, MixLMSwitchForMaskedLM])
def test_gradient_checkpointing_gives_the_same_gradients(model_class, layer_group, residual_attention, use_reentrant):
    """Dropout is on: the second run of a layer must draw the same masks. The loss holds the routers' part."""
    plain = build(model_class, layer_group=layer_group, residual_attention=residual_attention).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert checkpointed.is_activation_checkpointing
    inputs = batch()
    losses = []
    for model in (plain, checkpointed):
        torch.manual_seed(2)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    for (name, parameter), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-5, atol=1e-7, msg=f"gradient of {name}")


@pytest.mark.parametrize("residual_attention", [True, False])
def test_compiles_without_a_graph_break(residual_attention):
    torch._dynamo.reset()
    model = build(MixLMModel, residual_attention=residual_attention)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for inputs in (batch(), batch(rows=2, length=14)):
            expected = model(**inputs).last_hidden_state
            torch.testing.assert_close(compiled(**inputs).last_hidden_state, expected)


@pytest.mark.slow
def test_switch_compiles():
    """With graph breaks: how many tokens an expert gets is known at run time only."""
    torch._dynamo.reset()
    model, inputs = build(MixLMSwitchModel), batch()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


@pytest.mark.parametrize(
    "model_class",
    [
        MixLMModel,
        MixLMSwitchModel,
        *(pytest.param(c, marks=pytest.mark.slow) for c in (*HEADS[1:], MixLMSwitchForMaskedLM)),
    ],
)
def test_exports_for_any_batch_and_length(model_class):
    model, inputs = build(model_class), batch()
    sizes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("length", max=SIZES["max_position_embeddings"])}
    exported = torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, sizes)).module()
    with torch.no_grad():
        other = batch(rows=5, length=13)
        torch.testing.assert_close(exported(**other)[0], model(**other)[0])
