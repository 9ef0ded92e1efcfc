"""The metrics of a retriever are those of a search through all passages, on any number of ranks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from small_runs import PASSAGES, Rows, build_model, passage_ids

from mixlm.data.retrieval import EMPTY_PASSAGE, EncodedTexts
from mixlm.training import retrieval
from mixlm.training.optimization import OptimizerSettings
from mixlm.training.retrieval import RetrievalData, best_passages, evaluate_retrieval
from mixlm.training.sharding import build_engine, sharding_units
from mixlm.training.verification import CASES, Case

QUERIES = 20
# Of the tokenizer nothing else is needed.
TOKENIZER = SimpleNamespace(pad_token_id=0, empty_passage=passage_ids(EMPTY_PASSAGE))


def data() -> RetrievalData:
    rows = [Rows("retrieval")[0, index] for index in range(QUERIES)]
    return RetrievalData(
        None,
        EncodedTexts([row["input_ids"] for row in rows]),
        EncodedTexts([passage_ids(number) for number in range(PASSAGES)]),
        [row["passage"] for row in rows],
    )


@torch.no_grad()
def plain_metrics() -> dict[str, float]:
    """Each text encoded alone, and all passages sorted."""
    model = build_model("mixlm", "retrieval", two_towers=True).eval()
    of = data()
    queries = torch.cat([model(torch.tensor(ids)[None]).embeddings for ids in of.queries.texts])
    passages = [model(context_input_ids=torch.tensor(ids)[None]).context_embeddings for ids in of.passages.texts]
    scores = (queries @ torch.cat(passages).T).numpy()
    empty = model(context_input_ids=torch.tensor(TOKENIZER.empty_passage)[None]).context_embeddings
    has_none = np.array(of.relevant) == EMPTY_PASSAGE
    says_none = (queries @ empty.T).numpy()[:, 0] > scores.max(axis=1)
    ranks = np.array(
        [
            1 + np.argsort(-row).tolist().index(own)
            for row, own in zip(scores, of.relevant, strict=True)
            if own != EMPTY_PASSAGE
        ]
    )
    return {
        **{f"accuracy@{cutoff}": 100 * np.mean(ranks <= cutoff) for cutoff in (1, 5, 10, 20, 100)},
        **{f"recall@{cutoff}": 100 * np.mean(ranks <= cutoff) for cutoff in (10, 100)},
        "mrr@10": 100 * np.mean(np.where(ranks <= 10, 1 / ranks, 0)),
        "ndcg@10": 100 * np.mean(np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0)),
        "map": 100 * np.mean(1 / ranks),
        "no_answer_accuracy": 100 * np.mean(says_none == has_none),
    }


def metrics_on_a_rank(case: Case, rows: int) -> dict[str, float]:
    model = build_model("mixlm", "retrieval", two_towers=True)
    units = sharding_units(model)
    units = units if case.auto_wrap else units[-1:]
    engine = build_engine(model, OptimizerSettings(1e-3, 0.0, 1e-8), "fp32", case.zero, case.sharding_backend, units)
    engine.eval()
    return evaluate_retrieval(engine, data(), rows, TOKENIZER, Accelerator(cpu=True))


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_metrics_are_those_of_a_plain_search(rows):
    assert EMPTY_PASSAGE in data().relevant
    found, expected = metrics_on_a_rank(CASES[0], rows), plain_metrics()
    assert found == pytest.approx(expected, abs=1e-4) and 0 < expected["mrr@10"] < 100


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranks_share_the_encoding(two_ranks, case):
    """20 queries in batches of 3 on 2 ranks: in the last one there is nothing left for one of them."""
    expected = plain_metrics()
    for found in two_ranks(metrics_on_a_rank, case, 3):
        assert found == pytest.approx(expected, abs=1e-4)


def test_whether_there_is_an_answer_in_a_case_done_by_hand():
    """Passage 3 is the best of all for query 0 and query 1; the empty one is better still for query 1 and query 2."""
    vectors = torch.tensor([[1.0, 0, 0], [1, 2, 0], [0, 0, 1], [4, 0, 0], [0, 4, 1.5]])  # the last one is empty

    def engine(**inputs):
        prefix = "context_" if "context_input_ids" in inputs else ""
        return SimpleNamespace(**{f"{prefix}embeddings": vectors[inputs[f"{prefix}input_ids"][:, 0]]})

    def texts(*numbers):
        return EncodedTexts([np.array([number]) for number in numbers])

    tokenizer = SimpleNamespace(pad_token_id=0, empty_passage=np.array([4]))
    for relevant, right in (((0, -1, -1), 3), ((0, 0, -1), 2), ((-1, 0, 1), 0)):
        of = RetrievalData(None, texts(0, 1, 2), texts(3, 0), relevant)
        found = evaluate_retrieval(engine, of, 2, tokenizer, Accelerator(cpu=True))
        assert found["no_answer_accuracy"] == pytest.approx(100 * right / 3)
    of = RetrievalData(None, texts(0, 1, 2), texts(3, 0), (0, 0, 0))
    assert "no_answer_accuracy" not in evaluate_retrieval(engine, of, 2, tokenizer, Accelerator(cpu=True))


@pytest.mark.parametrize("count", [1, 7, 30, 99])
def test_the_best_passages_are_the_first_of_all_sorted(monkeypatch, count):
    monkeypatch.setattr(retrieval, "SCORED_AT_ONCE", 4)
    random = np.random.default_rng(0)
    queries, passages = (random.standard_normal((number, 5)).astype(np.float32) for number in (10, 30))
    scores = queries @ passages.T
    found = list(best_passages(queries, passages, count))
    assert len(found) == 10
    for row, (numbers, of_them) in zip(scores, found, strict=True):
        expected = np.argsort(-row)[:count]
        assert numbers.tolist() == expected.tolist()
        np.testing.assert_allclose(of_them, row[expected], rtol=1e-6)
