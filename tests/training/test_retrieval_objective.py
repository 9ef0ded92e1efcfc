"""The retrieval loss of a step: a softmax over the distinct passages of all its micro-batches and ranks."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import EMPTY_PASSAGE_IDS, Rows, build_model, passage_ids
from torch import Tensor

from mixlm.data.batching import collate
from mixlm.data.retrieval import EMPTY_PASSAGE
from mixlm.live_memory import LiveMemory
from mixlm.training import objectives
from mixlm.training.objectives import (
    RetrievalObjective,
    repeated_candidates,
    retrieval_gradients,
    with_context,
)
from mixlm.training.optimization import OptimizerSettings
from mixlm.training.sharding import build_engine, number_of_ranks, this_rank

# Losses are float32 whatever the model; in float64 the encoder adds no error of its own.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
SPLITS = pytest.mark.parametrize("sizes", [[8], [4, 4], [1] * 8, [5, 1, 2]], ids=["1x8", "2x4", "8x1", "uneven"])
FAMILIES = pytest.mark.parametrize("family", ["mixlm", "switch"])


def examples() -> list[dict]:
    rows = Rows("retrieval")
    return [rows[0, index] for index in range(8)]


def micro_batches(of: list[dict], sizes: list[int]) -> list[dict[str, Tensor]]:
    firsts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [collate(of[first : first + size], 0) for first, size in zip(firsts, sizes, strict=True)]


def gradients(model) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and any(tensor.abs().max() > 1e-3 for tensor in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def plain_loss(model, of: list[dict], temperature: float, has_empty_passage: bool) -> tuple[Tensor, Tensor, float]:
    """The retrieval loss, the auxiliary loss and the accuracy, from one forward pass and the formula."""
    rows = [number for example in of for number in example["context_passage"]]
    rows += [EMPTY_PASSAGE] * has_empty_passage
    candidates = list(dict.fromkeys(rows))
    queries = model(**collate([{"input_ids": example["input_ids"]} for example in of], 0))
    contexts = model(**collate([{"input_ids": passage_ids(number)} for number in rows], 0))
    vectors = torch.stack([contexts.embeddings[rows.index(number)] for number in candidates])
    scores = queries.embeddings @ vectors.T / temperature
    loss, right = 0, 0
    for row, example in zip(scores, of, strict=True):
        own = candidates.index(example["passage"])
        loss = loss - torch.log(torch.exp(row - row.max())[own] / torch.exp(row - row.max()).sum()) / len(of)
        right += int(row.argmax()) == own
    aux_loss = torch.zeros(())
    if queries.aux_loss is not None:
        texts = len(of) + len(rows)
        aux_loss = (len(of) * queries.aux_loss + len(rows) * contexts.aux_loss) / texts
    return loss, aux_loss, right / len(of)


def gradients_of_step(model, batches: list[dict[str, Tensor]], **options) -> tuple[dict[str, Tensor], dict]:
    """The summed gradients of one step, and the means of its terms."""
    objective = RetrievalObjective(Accelerator(cpu=True), model, **options)
    step = objective.begin_step(batches)
    sums, weights = {}, {}
    for number, batch in enumerate(batches):
        loss, terms = objective.loss(batch, number, step)
        loss.backward()
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + float(torch.as_tensor(term.sum).detach())
            weights[name] = weights.get(name, 0) + float(term.weight)
    return gradients(model), {name: sums[name] / weights[name] for name in sums}


def test_the_rows_of_these_tests_have_what_can_go_wrong():
    numbers = [example["context_passage"] for example in examples()]
    flat = sum(numbers, [])
    assert len(set(map(len, numbers))) > 1 and len(set(flat)) < len(flat)
    owned = [own for own, *_ in numbers]
    assert EMPTY_PASSAGE in owned and len(set(owned)) < len(owned)
    assert set(owned) & {number for _, *others in numbers for number in others}


@SPLITS
@FAMILIES
@pytest.mark.parametrize(("temperature", "has_empty_passage"), [(1.0, False), (3.0, True)])
def test_any_split_gives_the_gradient_and_the_losses_of_the_formula(family, sizes, temperature, has_empty_passage):
    model = build_model(family, "retrieval").double()
    loss, aux_loss, accuracy = plain_loss(model, examples(), temperature, has_empty_passage)
    (loss + aux_loss).backward()
    expected = gradients(model)

    empty_passage = EMPTY_PASSAGE_IDS if has_empty_passage else None
    options = {"temperature": temperature, "empty_passage": empty_passage}
    found, means = gradients_of_step(model, micro_batches(examples(), sizes), **options)
    assert_same_gradients(found, expected)
    assert means["ict"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert means["ict_accuracy"] == pytest.approx(accuracy)
    if family == "switch":
        assert means["aux"] == pytest.approx(float(aux_loss.detach()), rel=1e-5)


@SPLITS
@FAMILIES
def test_without_numbers_of_passages_every_context_is_a_candidate(family, sizes):
    """As the model itself has it; a pair has nothing but its texts in the inverse cloze task."""
    rows = [{name: example[name] for name in ("input_ids", "context_input_ids")} for example in examples()]
    model = build_model(family, "retrieval").double()
    model(**collate(rows, 0)).loss.backward()
    expected = gradients(model)
    assert_same_gradients(gradients_of_step(model, micro_batches(rows, sizes))[0], expected)


def random_step(queries: int, contexts: int, hidden: int = 4) -> tuple[Tensor, ...]:
    """Embeddings, the place of each query's own context, and numbers of passages that occur more than once."""
    generator = torch.Generator().manual_seed(0)
    context_passage = torch.randint(contexts // 2, (contexts,), generator=generator)
    own = torch.randint(contexts, (queries,), generator=generator)
    embeddings = (torch.randn(rows, hidden, generator=generator) for rows in (queries, contexts))
    return (*embeddings, own, (context_passage[own], context_passage))


@pytest.mark.parametrize("scores_at_once", [1, 45, 7 * 15 - 1], ids=["a query", "3 queries", "6 queries"])
@pytest.mark.parametrize("has_passages", [True, False])
def test_a_large_batch_is_scored_in_parts(monkeypatch, scores_at_once, has_passages):
    *step, passages = random_step(queries=7, contexts=15)
    step.append(passages if has_passages else None)
    whole = retrieval_gradients(*step, temperature=0.5)
    monkeypatch.setattr(objectives, "SCORES_AT_ONCE", scores_at_once)
    for found, expected in zip(retrieval_gradients(*step, temperature=0.5), whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_memory_does_not_grow_with_the_square_of_a_batch(monkeypatch):
    monkeypatch.setattr(objectives, "SCORES_AT_ONCE", 2**14)
    peaks = []
    for rows in (512, 1024):
        step = random_step(rows, rows)
        with LiveMemory() as memory:
            retrieval_gradients(*step, temperature=1.0)
        peaks.append(memory.peak())
    assert 17 * 2**14 < peaks[1] < 2 * peaks[0]


def test_the_loss_and_the_accuracy_of_a_case_done_by_hand():
    """Two questions about the passage 0, which is there twice; the hard negative of the other one wins."""
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [1.0, 5.0]])

    def engine(input_ids, context_input_ids, **others):
        embeddings, context_embeddings = vectors[input_ids[:, 0]], vectors[context_input_ids[:, 0]]
        return SimpleNamespace(embeddings=embeddings, context_embeddings=context_embeddings)

    engine.config = SimpleNamespace()
    objective = RetrievalObjective(Accelerator(cpu=True), engine)
    batch = {
        "input_ids": torch.tensor([[0], [1], [0]]),
        "context_input_ids": torch.tensor([[2], [1], [3], [2]]),
        "context_first_rows": torch.tensor([0, 1, 3]),
        "passage": torch.tensor([0, 1, 0]),
        "context_passage": torch.tensor([0, 1, 2, 0]),
    }
    _, terms = objective.loss(batch, 0, objective.begin_step([batch]))
    first = math.log(math.exp(2) + 1 + math.exp(1)) - 2
    second = math.log(1 + math.exp(1) + math.exp(5)) - 1
    assert float(terms["ict"].sum) == pytest.approx(2 * first + second) and terms["ict"].weight == 3
    assert float(terms["ict_accuracy"].sum) == pytest.approx(2)
    assert float(terms["ict_candidates"].sum) == 3 * 3  # of the four contexts, one of the two of passage 0


def test_repeated_candidates_of_a_case_done_by_hand():
    excluded = repeated_candidates(
        torch.tensor([3, 5, 3]), torch.tensor([3, 7, 5, 7, 3, 5]), own=torch.tensor([0, 2, 4])
    )
    assert excluded.int().tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1], [1, 0, 0, 1, 0, 1]]


@settings(derandomize=True, max_examples=60, deadline=None, database=None)
@given(contexts=st.lists(st.integers(-1, 3), min_size=1, max_size=9), data=st.data())
def test_each_passage_is_one_candidate_of_each_query(contexts, data):
    own = data.draw(st.lists(st.integers(0, len(contexts) - 1), min_size=1, max_size=5))
    context_passage, places = torch.tensor(contexts), torch.tensor(own)
    excluded = repeated_candidates(context_passage[places], context_passage, places)
    for row, place in zip(excluded, own, strict=True):
        assert sorted(context_passage[~row].tolist()) == sorted(set(contexts))
        assert not row[place]


def test_a_batch_with_one_more_context():
    ids = {"input_ids": np.array([5]), "context_input_ids": np.array([7, 8, 9])}
    batch = collate([{**ids, "context_passage": 4}], pad_token_id=0)
    more = with_context(batch, torch.tensor([2, 3]), passage=-1)
    assert more["context_input_ids"].tolist() == [[7, 8, 9], [2, 3, 0]]
    assert more["context_attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert more["context_passage"].tolist() == [4, -1] and more["context_first_rows"].tolist() == [0]
    assert len(batch["context_input_ids"]) == 1


def gradients_of_a_rank(family: str, sizes: list[int]) -> dict[str, Tensor]:
    """Of a step over all ranks, by name; a rank has every `ranks`-th row."""
    engine = build_engine(
        build_model(family, "retrieval").double(), OptimizerSettings(1e-3, 0.0, 1e-8), "fp32", 0, "torch", []
    )
    engine.train()
    objective = RetrievalObjective(Accelerator(cpu=True), engine, 3.0, EMPTY_PASSAGE_IDS)
    batches = micro_batches(examples()[this_rank() :: number_of_ranks()], sizes)
    step = objective.begin_step(batches)
    for number, batch in enumerate(batches):
        loss, _ = objective.loss(batch, number, step)
        (loss * number_of_ranks()).backward()
    return {name: each.grad for name, each in engine.parameters.items() if each.grad is not None}


@FAMILIES
@pytest.mark.parametrize("sizes", [[4], [3, 1]], ids=["1x4", "uneven"])
def test_ranks_share_a_step(two_ranks, family, sizes):
    """The first of them alone adds the empty passage, and they have different numbers of hard negatives."""
    expected = gradients_of_a_rank(family, [8])
    for found in two_ranks(gradients_of_a_rank, family, sizes):
        assert_same_gradients(found, expected)
