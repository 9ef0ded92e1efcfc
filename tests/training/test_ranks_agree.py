"""What only one of two ranks sees must not leave the other waiting, or ending without a reason."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from small_runs import Rows, build_arguments, build_model, run_small

from mixlm.data.batching import evaluation_batches
from mixlm.errors import UserError
from mixlm.training.evaluation import evaluate_pretraining, unigram_log_probabilities
from mixlm.training.objectives import SentenceOrderObjective
from mixlm.training.optimization import OptimizerSettings
from mixlm.training.sharding import build_engine, sharding_units, this_rank


class NoNumberOnTheSecondRank(SentenceOrderObjective):
    def loss(self, batch, number, step):
        loss, terms = super().loss(batch, number, step)
        return loss * torch.tensor(float("nan") if this_rank() == 1 else 1.0), terms


def error_of_a_run_without_numbers(output_dir: str, precision: dict) -> str:
    try:
        run_small(build_arguments(output_dir, **precision), objective_class=NoNumberOnTheSecondRank)
    except UserError as error:
        return str(error)
    return "none"


@pytest.mark.parametrize("precision", [{}, {"fp16": True}], ids=["fp32", "fp16"])
def test_a_loss_that_is_no_number_on_one_rank_ends_all_with_the_reason(tmp_path, two_ranks, precision):
    said = two_ranks(error_of_a_run_without_numbers, str(tmp_path), precision)
    assert said[0] == said[1] and said[0].startswith("step 1: the loss or its gradient is not a number")


def evaluate_on_a_rank(task: str, size: int, rows: int, zero: int) -> dict[str, float]:
    """Also called in the test's own process, as the one rank that there is."""
    accelerator = Accelerator(cpu=True)
    model = build_model(task=task)
    units = sharding_units(model)
    engine = build_engine(model, OptimizerSettings(1e-3, 0.0, 1e-8), "fp32", zero, "torch", units)
    engine.eval()
    ranks, rank = accelerator.num_processes, accelerator.process_index
    batches = evaluation_batches(Rows(task, size), rows, 0, rank, ranks)
    return evaluate_pretraining(engine, batches, accelerator, unigram_log_probabilities(np.ones(40)))


@pytest.mark.parametrize("task", ["SOP", "ICT"])
@pytest.mark.parametrize(("size", "rows"), [(1, 4), (5, 1)])
def test_a_sharded_model_is_evaluated_where_a_rank_has_no_row_left(two_ranks, task, size, rows):
    expected = evaluate_on_a_rank(task, size, rows, 0)
    for found in two_ranks(evaluate_on_a_rank, task, size, rows, 3):
        assert found == pytest.approx(expected, rel=1e-5)
        assert found["examples"] == size
