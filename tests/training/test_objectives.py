"""A step's gradient does not depend on how its rows are split."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from mixlm.heads import in_batch_retrieval_loss
from mixlm.training.objectives import InverseClozeObjective, SentenceOrderObjective, gather_rows

OBJECTIVES = {"SOP": SentenceOrderObjective, "ICT": InverseClozeObjective}
SPLITS = {"1x8": [8], "2x4": [4, 4], "4x2": [2, 2, 2, 2], "8x1": [1] * 8, "uneven": [5, 1, 2]}
# Losses are float32 whatever the model; in float64 the encoder adds no error of its own.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def split(make_rows, task, sizes, first=0):
    batches = []
    for size in sizes:
        batches.append(make_rows(task, range(first, first + size)))
        first += size
    return batches


def gradients(model):
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def gradients_of_step(model, task, micro_batches):
    """The summed gradients of one step, and its terms added up."""
    objective = OBJECTIVES[task](Accelerator(cpu=True), model)
    step = objective.begin_step(micro_batches)
    sums, weights = {}, {}
    for number, batch in enumerate(micro_batches):
        loss, terms = objective.loss(batch, number, step)
        loss.backward()
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + float(torch.as_tensor(term.sum).detach())
            weights[name] = weights.get(name, 0) + float(term.weight)
    return gradients(model), sums, weights


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("task", ["SOP", "ICT"])
@pytest.mark.parametrize("family", ["mixlm", "switch"])
def test_any_split_gives_the_gradient_and_the_losses_of_the_plain_batch(make_model, make_rows, family, task, sizes):
    model = make_model(family, task).double()
    plain = model(**make_rows(task, range(8)))
    plain.loss.backward()
    expected = gradients(model)
    # A bias of keys moves all scores of a query alike: softmax does not see it.
    assert all(gradient.abs().max() > 1e-4 for name, gradient in expected.items() if "key" not in name)

    found, sums, weights = gradients_of_step(model, task, split(make_rows, task, sizes))
    assert_same_gradients(found, expected)
    for name in ("mlm", "sop", "ict", "aux"):
        loss = getattr(plain, f"{name}_loss")
        assert (name in sums) == (loss is not None)
        if loss is not None:
            assert sums[name] / weights[name] == pytest.approx(float(loss.detach()), rel=1e-5)


def test_the_rows_of_these_tests_differ_in_length_and_in_masked_tokens(make_rows):
    for batch in (make_rows("SOP", range(8)), make_rows("ICT", range(8))):
        assert len(set(batch["attention_mask"].sum(dim=1).tolist())) > 2
        assert len(set((batch["labels"] != -100).sum(dim=1).tolist())) > 2
    assert set(make_rows("SOP", range(8))["sentence_order_label"].tolist()) == {0, 1, -100}


def test_weights_are_masked_tokens_and_scored_rows(make_model, make_rows):
    batch = make_rows("SOP", range(8))
    weights = SentenceOrderObjective(Accelerator(cpu=True), make_model()).weights(batch)
    assert weights == {
        "mlm": int((batch["labels"] != -100).sum()),
        "sop": int((batch["sentence_order_label"] != -100).sum()),
        "aux": 8,
    }
    batch = make_rows("ICT", range(8))
    weights = InverseClozeObjective(Accelerator(cpu=True), make_model(task="ICT")).weights(batch)
    masked = int((batch["labels"] != -100).sum()) + int((batch["context_labels"] != -100).sum())
    assert weights == {"mlm": masked, "ict": 8, "aux": 16}


@pytest.mark.parametrize("family", ["mixlm", "switch"])
@pytest.mark.parametrize("task", ["SOP", "ICT"])
def test_a_micro_batch_without_a_masked_token_or_a_scored_row_adds_nothing(make_model, make_rows, family, task):
    model = make_model(family, task).double()
    first, second = split(make_rows, task, [4, 4])
    for name in ("labels", "context_labels", "sentence_order_label"):
        if name in second:
            second[name] = torch.full_like(second[name], -100)
    both, sums, weights = gradients_of_step(model, task, [first, second])
    alone, sums_alone, weights_alone = gradients_of_step(model, task, [first])
    assert all(gradient.isfinite().all() for gradient in both.values())
    for name in ("mlm", "sop") if task == "SOP" else ("mlm",):
        assert weights[name] == weights_alone[name] > 0
        assert sums[name] == pytest.approx(sums_alone[name])
    # Queries and contexts have their retrieval all the same, and rows of Switch their routing: not so in the heads.
    heads = [name for name in alone if (task, family) == ("SOP", "mixlm") or name.startswith(("mlm_head", "sop_head"))]
    assert_same_gradients({name: both[name] for name in heads}, {name: alone[name] for name in heads})


def test_a_step_without_any_masked_token_has_no_gradient_and_no_nan(make_model, make_rows):
    model = make_model().double()
    batch = make_rows("SOP", range(4))
    batch["labels"].fill_(-100)
    batch["sentence_order_label"].fill_(-100)
    found, sums, weights = gradients_of_step(model, "SOP", [batch])
    assert sums["mlm"] == weights["mlm"] == sums["sop"] == 0
    assert all((gradient == 0).all() for gradient in found.values())


@pytest.mark.parametrize("family", ["mixlm", "switch"])
def test_caching_sees_the_same_dropout_masks_twice(make_model, make_rows, family):
    model = make_model(family, "ICT", dropout_prob=0.3).double()
    micro_batches = split(make_rows, "ICT", [3, 3, 2])
    torch.manual_seed(5)
    outputs = [model(**batch) for batch in micro_batches]
    masked = [
        sum(int((batch[name] != -100).sum()) for name in ("labels", "context_labels")) for batch in micro_batches
    ]
    loss = in_batch_retrieval_loss(
        torch.cat([output.embeddings for output in outputs]),
        torch.cat([output.context_embeddings for output in outputs]),
    )
    loss = loss + sum(output.mlm_loss * number for output, number in zip(outputs, masked, strict=True)) / sum(masked)
    if family == "switch":
        loss = loss + sum(output.aux_loss * len(output.embeddings) for output in outputs) / 8
    loss.backward()
    expected = gradients(model)

    torch.manual_seed(5)
    found, _, _ = gradients_of_step(model, "ICT", micro_batches)
    assert_same_gradients(found, expected)
    torch.manual_seed(6)  # and the masks do matter
    others, _, _ = gradients_of_step(model, "ICT", micro_batches)
    assert any(not torch.allclose(others[name], expected[name], rtol=1e-2) for name in expected)


def test_negatives_are_the_whole_step(make_model, make_rows):
    model = make_model(task="ICT").double()
    _, sums, weights = gradients_of_step(model, "ICT", split(make_rows, "ICT", [2, 2, 2, 2]))
    by_pairs = []
    for batch in split(make_rows, "ICT", [2, 2, 2, 2]):
        by_pairs.append(float(model(**batch).ict_loss.detach()))
    assert sums["ict"] / weights["ict"] > sum(by_pairs) / 4 + 0.1


@pytest.mark.parametrize("task", ["SOP", "ICT"])
def test_shares_of_experts_sum_to_one_and_every_layer_counts(make_model, make_rows, task):
    _, sums, weights = gradients_of_step(make_model("switch", task), task, split(make_rows, task, [4, 4]))
    tokens = int(make_rows(task, range(8))["attention_mask"].sum())
    shares = [f"expert_{number}_share" for number in range(3)]
    assert [weights[name] for name in [*shares, "dropped_share"]] == [2 * tokens] * 4
    assert sum(sums[name] for name in shares) == 2 * tokens
    assert 0 <= sums["dropped_share"] < 2 * tokens


def test_mixlm_has_no_routing_terms(make_model, make_rows):
    _, sums, _ = gradients_of_step(make_model(), "SOP", [make_rows("SOP", range(4))])
    assert sums.keys() == {"mlm", "sop"}


def test_the_routing_of_a_case_done_by_hand(make_model):
    objective = SentenceOrderObjective(Accelerator(cpu=True), make_model("switch", n_experts=2, capacity_factor=1.0))
    # Two sequences of 4 and 2 real tokens: an expert takes 2 and 1 of them.
    chosen = torch.tensor([[0, 0, 0, 1], [1, 1, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    logits = torch.nn.functional.one_hot(chosen, 2).float()
    terms = objective._routing_terms(SimpleNamespace(router_logits=(logits, logits)), {"attention_mask": mask})
    found = {name: (int(term.sum), int(term.weight)) for name, term in terms.items()}
    assert found == {"expert_0_share": (6, 12), "expert_1_share": (6, 12), "dropped_share": (4, 12)}


def test_gathered_rows_have_no_gradient():
    rows = torch.randn(3, 2, requires_grad=True)
    gathered, first = gather_rows(Accelerator(cpu=True), rows)
    assert not gathered.requires_grad and first == 0
    assert torch.equal(gathered, rows.detach().float())
