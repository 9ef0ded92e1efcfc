import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from mixlm.heads import PreTrainingOutput, masked_lm_loss
from mixlm.training import evaluation
from mixlm.training.evaluation import evaluate_pretraining, recall_at_1, unigram_log_probabilities

UNIGRAM = torch.tensor([0.5, 0.25, 0.25]).log()


class Stub(nn.Module):
    """Gives the outputs that a batch carries under `_outputs` by the number in its first token."""

    def __init__(self, outputs: list[PreTrainingOutput], objective: str):
        super().__init__()
        self.outputs = outputs
        self.config = SimpleNamespace(pretraining_objective=objective, hidden_size=2)  # of the embeddings below

    def forward(self, input_ids, labels, context_labels=None, **other):
        output = self.outputs[int(input_ids[0, 0])]
        targets = torch.cat([part[part != -100] for part in (labels, context_labels) if part is not None])
        output.mlm_loss = masked_lm_loss(output.prediction_logits, targets)
        return output


def counting(batches):
    """As from `evaluation_batches`, with one at the end that another rank has counted."""
    return [*((batch, True) for batch in batches), (batches[0], False)]


def logits(rows):
    """Rows of probabilities as logits."""
    return torch.tensor(rows).log()


def test_metrics_of_sentence_order_by_hand():
    batches = [
        {
            "input_ids": torch.tensor([[0, 1], [1, 1]]),
            "labels": torch.tensor([[-100, 0], [2, 1]]),
            "sentence_order_label": torch.tensor([0, 1]),
        },
        {
            "input_ids": torch.tensor([[1, 1]]),
            "labels": torch.tensor([[2, -100]]),
            "sentence_order_label": torch.tensor([-100]),
        },
    ]
    outputs = [
        PreTrainingOutput(
            prediction_logits=logits([[0.8, 0.1, 0.1], [0.5, 0.25, 0.25], [0.2, 0.6, 0.2]]),
            sop_logits=torch.tensor([[2.0, 1.0], [2.0, 1.0]]),
        ),
        PreTrainingOutput(prediction_logits=logits([[0.1, 0.1, 0.8]]), sop_logits=torch.tensor([[0.0, 1.0]])),
    ]
    metrics = evaluate_pretraining(Stub(outputs, "sop"), counting(batches), Accelerator(cpu=True), UNIGRAM)
    loss = -(math.log(0.8) + math.log(0.25) + math.log(0.6) + math.log(0.8)) / 4
    assert metrics == pytest.approx(
        {
            "mlm_loss": loss,
            "mlm_accuracy": 3 / 4,
            "perplexity": math.exp(loss),
            "unigram_loss": -(math.log(0.5) + 3 * math.log(0.25)) / 4,
            "examples": 3,
            "sop_accuracy": 1 / 2,
        },
        rel=1e-5,
    )


def test_metrics_of_the_inverse_cloze_task_by_hand():
    """The contexts of all batches are candidates: the query of the second batch prefers one of the first."""
    batches = [
        {
            "input_ids": torch.tensor([[0, 1], [1, 1]]),
            "labels": torch.tensor([[-100, 0], [-100, -100]]),
            "context_labels": torch.tensor([[1], [-100]]),
        },
        {
            "input_ids": torch.tensor([[1, 1]]),
            "labels": torch.tensor([[-100, -100]]),
            "context_labels": torch.tensor([[-100]]),
        },
    ]
    outputs = [
        PreTrainingOutput(
            prediction_logits=logits([[0.8, 0.1, 0.1], [0.5, 0.25, 0.25]]),
            embeddings=torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
            context_embeddings=torch.tensor([[2.0, 0.0], [0.0, 2.0]]),
        ),
        PreTrainingOutput(
            prediction_logits=torch.zeros(0, 3),
            embeddings=torch.tensor([[1.0, 1.5]]),
            context_embeddings=torch.tensor([[1.0, 1.0]]),
        ),
    ]
    metrics = evaluate_pretraining(Stub(outputs, "ict"), counting(batches), Accelerator(cpu=True), UNIGRAM)
    loss = -(math.log(0.8) + math.log(0.25)) / 2
    assert metrics == pytest.approx(
        {
            "mlm_loss": loss,
            "mlm_accuracy": 1 / 2,
            "perplexity": math.exp(loss),
            "unigram_loss": -(math.log(0.5) + math.log(0.25)) / 2,
            "examples": 3,
            "ict_recall@1": 2 / 3,
        },
        rel=1e-5,
    )


def test_evaluation_does_not_depend_on_the_batches(make_model, make_rows):
    found = []
    for sizes in ([12], [5, 4, 3]):
        model = make_model("switch", "ICT").eval()
        first, batches = 0, []
        for size in sizes:
            batches.append(make_rows("ICT", range(first, first + size)))
            first += size
        unigram = unigram_log_probabilities(np.arange(40))
        found.append(evaluate_pretraining(model, counting(batches), Accelerator(cpu=True), unigram))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0]["examples"] == 12


def test_a_hopeless_model_has_a_finite_perplexity():
    batch = {
        "input_ids": torch.tensor([[0]]),
        "labels": torch.tensor([[0]]),
        "sentence_order_label": torch.tensor([0]),
    }
    output = PreTrainingOutput(prediction_logits=torch.tensor([[-1e5, 0, 0]]), sop_logits=torch.zeros(1, 2))
    metrics = evaluate_pretraining(Stub([output], "sop"), counting([batch]), Accelerator(cpu=True), UNIGRAM)
    assert math.isfinite(metrics["perplexity"]) and metrics["mlm_loss"] == pytest.approx(1e5, rel=1e-4)


def test_the_unigram_model_by_hand():
    found = unigram_log_probabilities(np.array([0, 3, 5]))
    assert found.exp().tolist() == pytest.approx([1 / 11, 4 / 11, 6 / 11])
    assert found.dtype == torch.float32


def test_recall_at_1_by_hand():
    contexts = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    # The second and the third query like contexts 1 and 2 alike; the first of equals is taken.
    assert recall_at_1(queries, contexts) == pytest.approx(2 / 3)
    assert recall_at_1(queries[[1, 0, 2]], contexts) == 0
    assert recall_at_1(queries[:0], contexts[:0]) == 0


@pytest.mark.parametrize("chunk", [1, 2, 7, 50, 1024])
def test_recall_does_not_depend_on_the_chunk(monkeypatch, chunk):
    random = torch.Generator().manual_seed(0)
    queries = torch.randn(50, 8, generator=random)
    contexts = queries + 1.5 * torch.randn(50, 8, generator=random)
    expected = sum(int((contexts @ query).argmax() == row) for row, query in enumerate(queries)) / 50
    assert 0 < expected < 1
    monkeypatch.setattr(evaluation, "RECALL_CHUNK", chunk)
    assert recall_at_1(queries, contexts) == expected
