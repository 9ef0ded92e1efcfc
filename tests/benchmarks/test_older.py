"""The older formulation gives today's numbers: a speed-up over it is one of the same function."""

import pytest
import torch
from older import OlderEncoder, OlderForPreTraining
from oracle import random_batch, small_model

from mixlm import MixLMForPreTraining, MixLMModel

EXACT = {"rtol": 1e-10, "atol": 1e-10}
EVERY_STRUCTURE = pytest.mark.parametrize(
    "fields",
    [
        {"ln_pos": ln_pos, "layer_group": layer_group, "shared_parameters": shared_parameters}
        for ln_pos in (0, 1)
        for layer_group, shared_parameters in ((1, "all"), (2, "all"), (2, "ffn"), (4, "attention"))
    ],
    ids=lambda fields: "-".join(str(value) for value in fields.values()),
)


@pytest.fixture(autouse=True)
def float64():
    """Weights are copied into new modules, which must not round them."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@EVERY_STRUCTURE
class TestEqualsMixLM:
    def test_encoder(self, fields):
        model = small_model(MixLMModel, **fields)
        batch = random_batch(model.config, [7, 4, 1])
        real = batch["attention_mask"].bool()
        older = OlderEncoder(model)(**batch)
        torch.testing.assert_close(older[real], model(**batch).last_hidden_state[real], **EXACT)

    def test_loss(self, fields):
        model = small_model(MixLMForPreTraining, **fields)
        batch = random_batch(model.config, [7, 4, 2])
        del batch["token_type_ids"]
        labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
        labels[:, ::3] = -100
        batch |= {"labels": labels, "sentence_order_label": torch.tensor([0, 1, 1])}
        torch.testing.assert_close(OlderForPreTraining(model)(**batch).loss, model(**batch).loss, **EXACT)


@pytest.mark.parametrize("act_fn", ["gelu", "relu", "swish"])
@pytest.mark.parametrize("kernel_size, num_heads, n_experts", [(1, 1, 1), (3, 4, 1), (5, 2, 3), (9, 3, 2), (15, 2, 6)])
def test_sizes(kernel_size, num_heads, n_experts, act_fn):
    sizes = {"kernel_size": kernel_size, "num_heads": num_heads, "n_experts": n_experts, "act_fn": act_fn}
    model = small_model(MixLMModel, **sizes, ff_dim=48, num_hidden_layers=2)
    batch = random_batch(model.config, [9, 5])
    real = batch["attention_mask"].bool()
    older = OlderEncoder(model)(**batch)
    torch.testing.assert_close(older[real], model(**batch).last_hidden_state[real], **EXACT)
