"""The gradient of machine reading does not depend on how a step is split."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import mixlm
from mixlm.data.batching import collate
from mixlm.training.objectives import ReadingObjective
from mixlm.training.optimization import OptimizerSettings
from mixlm.training.sharding import build_engine, number_of_ranks, this_rank


def rows() -> list[dict]:
    """Eight windows of different lengths, some without an answer."""
    found = []
    for number in range(8):
        random = np.random.default_rng(number)
        length = int(random.integers(6, 14))
        start = int(random.integers(0, length - 2)) if number % 3 else 0
        token_types = (np.arange(length) >= 3).astype(np.int64)
        ids = random.integers(5, 40, length)
        end = start + (1 if start else 0)
        fields = {"start_positions": start, "end_positions": end, "window": number}
        found.append({"input_ids": ids, "token_type_ids": token_types, **fields})
    return found


def gradients(micro_batches: int) -> dict[str, torch.Tensor]:
    """Of a step over all ranks, by name; what a rank has is every `ranks`-th row."""
    config = mixlm.MixLMConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, ff_dim=24, max_position_embeddings=16, kernel_size=5,
        n_experts=2, num_heads=2, dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    engine = build_engine(
        mixlm.MixLMForQuestionAnswering(config).double(), OptimizerSettings(1e-3, 0.0, 1e-8), "fp32", 0, "torch", []
    )
    engine.train()
    objective = ReadingObjective(accelerator, engine)
    own = rows()[this_rank() :: number_of_ranks()]
    batches = [collate(own[first::micro_batches], pad_token_id=0) for first in range(micro_batches)]
    step = objective.begin_step(batches)
    for number, batch in enumerate(batches):
        loss, _ = objective.loss(batch, number, step)
        (loss * number_of_ranks()).backward()
    return {name: each.grad for name, each in engine.parameters.items() if each.grad is not None}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and any(tensor.abs().max() > 1e-3 for tensor in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("micro_batches", [2, 4, 3])
def test_micro_batches(micro_batches):
    assert_close(gradients(micro_batches), gradients(1))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_ranks(two_ranks, micro_batches):
    expected = gradients(1)
    for found in two_ranks(gradients, micro_batches):
        assert_close(found, expected)
