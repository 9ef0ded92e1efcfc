"""The forms of a forward pass side by side: what the tests of the kernels share."""

import pytest
import torch
from oracle import random_batch, small_model

from mixlm import MixLMModel, MixLMSwitchModel, modeling_mixlm

FORMS = ("fused", "lean")
BOTH_FAMILIES = pytest.mark.parametrize("model_class", [MixLMModel, MixLMSwitchModel])
EVERY_FORM = pytest.mark.parametrize("form", FORMS)
EXACT = {"rtol": 1e-10, "atol": 1e-10}
LENGTHS = [7, 4, 6]


def dropping_model(model_class, **fields):
    return small_model(model_class, **{"num_hidden_layers": 2, "dropout_prob": 0.3, **fields}).train()


def some_numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64)


def weighted_sum(output):
    """A loss to which every number of the output matters."""
    hidden = output.last_hidden_state
    loss = (hidden.double() * some_numbers(*hidden.shape)).sum()
    return loss if output.aux_loss is None else loss + output.aux_loss


def run(model, form, batch, loss_of=weighted_sum, **kwargs):
    """The output of a form, and by name the gradients of all parameters and of the word embeddings that went in."""
    model.config.kernels = form
    model.zero_grad()
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    inputs = {name: tensor for name, tensor in batch.items() if name != "input_ids"}
    torch.manual_seed(5)
    output = model(inputs_embeds=embeds, **inputs, **kwargs)
    loss_of(output).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return output, {"inputs_embeds": embeds.grad, **gradients}


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert (ours[name] is None) == (expected is None), name
        if expected is not None:
            torch.testing.assert_close(
                ours[name], expected, **EXACT, msg=lambda text, name=name: f"gradient of {name}: {text}"
            )


def assert_forms_agree(model, batch, forms=FORMS, **kwargs):
    expected, gradients = run(model, "plain", batch, **kwargs)
    assert any(gradient is not None and gradient.abs().max() > 1e-3 for gradient in gradients.values())
    for form in forms:
        output, its_gradients = run(model, form, batch, **kwargs)
        torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, **EXACT)
        assert_same_gradients(its_gradients, gradients)


def batch_of(model, lengths=LENGTHS, padded=True):
    batch = random_batch(model.config, lengths, seed=3)
    if not padded:
        del batch["attention_mask"]
    return batch


def calls_of(monkeypatch, *names):
    """How often each of these functions of the kernels is called from now on."""
    counts = dict.fromkeys(names, 0)

    def counting(name, function):
        def counted(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return counted

    for name in names:
        monkeypatch.setattr(modeling_mixlm, name, counting(name, getattr(modeling_mixlm, name)))
    return counts
