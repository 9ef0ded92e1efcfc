"""Every sharding engine trains as one process does, and their checkpoints are one another's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import ROWS_PER_STEP, build_arguments, reset_accelerate, run_small

from mixlm.training.report import read_curves
from mixlm.training.verification import CASES, Case, available_cases

ENGINES = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
ENGINES_WITH_MUON = pytest.mark.parametrize("case", available_cases(muon=True), ids=lambda case: case.name)
# Large beside rounding: AdamW would make a full step of a gradient that is nothing else.
EPSILON = 1e-3


def train_on_a_rank(output_dir: str, arguments: dict, run: dict) -> None:
    """What each rank does; also called in the test's own process, as the one rank that there is."""
    run_small(build_arguments(output_dir, adam_epsilon=EPSILON, **arguments), **run)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """(arguments, run) -> the folder of that run on one process, which is made once for all engines."""
    folders = {}

    def train(arguments: dict, run: dict) -> Path:
        key = repr((arguments, run))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("one-process")
            train_on_a_rank(str(folders[key]), arguments, run)
        return folders[key]

    return train


def checkpoint(output_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and moments of a checkpoint, by name."""
    folder = output_dir / "run" / "checkpoints" / f"step-{step:08d}"
    weights = load_file(folder / "model" / "model.safetensors")
    return {**weights, **load_file(folder / "optimizer.safetensors")}


def curve(output_dir: Path, name: str) -> np.ndarray:
    return np.array([value for _, value in read_curves(output_dir / "run")[name]])


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float, atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize(
    ("family", "task", "fields"),
    [
        ("mixlm", "SOP", {"num_hidden_layers": 6, "layer_group": 3, "shared_parameters": "all"}),
        ("switch", "ICT", {"num_hidden_layers": 2, "layer_group": 2, "shared_parameters": "ffn"}),
        pytest.param(
            *("switch", "ICT", {"num_hidden_layers": 4, "layer_group": 2, "shared_parameters": "ffn"}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("mixlm", "ICT", {"num_hidden_layers": 4, "layer_group": 2, "shared_parameters": "ffn"}),
            marks=pytest.mark.slow,
        ),
        pytest.param("switch", "SOP", {"ln_pos": 1}, marks=pytest.mark.slow),
        ("mixlm", "reading", {"num_hidden_layers": 4, "layer_group": 2, "shared_parameters": "attention"}),
        pytest.param("switch", "reading", {}, marks=pytest.mark.slow),
        ("switch", "retrieval", {"two_towers": True}),
        pytest.param("mixlm", "retrieval", {"layer_group": 2}, marks=pytest.mark.slow),
    ],
    ids=[
        *("mixlm-sop-all", "switch-ict-ffn", "switch-ict-ffn-4", "mixlm-ict-ffn", "switch-sop"),
        *("mixlm-reading", "switch-reading", "switch-retrieval", "mixlm-retrieval"),
    ],
)
@ENGINES
def test_every_engine_follows_one_process(tmp_path, one_process, two_ranks, case, family, task, fields):
    """Two ranks of two micro-batches: sums and weights, the negatives of ICT, clipping and decay are global."""
    run = {"family": family, "task": task, "dropout_prob": 0.0, **fields}
    arguments = {"num_steps": 3, "max_grad_norm": 0.5, "weight_decay": 0.1}
    expected = one_process(arguments, run)
    two_ranks(train_on_a_rank, str(tmp_path), {**arguments, **case._asdict()}, run)
    for name in ("train/loss", "train/grad_norm"):
        np.testing.assert_allclose(curve(tmp_path, name), curve(expected, name), rtol=2e-5)
    assert curve(expected, "train/grad_norm").min() > 0.5  # so every step was clipped
    assert_close(checkpoint(tmp_path, 3), checkpoint(expected, 3), rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("family", ["mixlm", "switch"])
@ENGINES_WITH_MUON
def test_every_engine_follows_one_process_with_muon(tmp_path, one_process, two_ranks, case, family):
    run = {"family": family, "dropout_prob": 0.0, "num_hidden_layers": 2}
    arguments = {"num_steps": 3, "weight_decay": 0.1}
    expected = one_process({**arguments, "muon": True}, run)
    two_ranks(train_on_a_rank, str(tmp_path), {**arguments, **case._asdict()}, run)
    np.testing.assert_allclose(curve(tmp_path, "train/loss"), curve(expected, "train/loss"), rtol=2e-5)
    assert_close(checkpoint(tmp_path, 3), checkpoint(expected, 3), rtol=1e-3, atol=1e-5)


def gradient(output_dir: Path) -> dict[str, torch.Tensor]:
    """After one step AdamW's first moment is a tenth of the gradient."""
    return {name: 10 * tensor for name, tensor in checkpoint(output_dir, 1).items() if name.startswith("exp_avg/")}


def one_step(task: str, dtype: torch.dtype, micro_batches: int) -> tuple[dict, dict]:
    """What `gradient` is of: the arguments and the run."""
    arguments = {"num_steps": 1, "max_grad_norm": 0.0, "gradient_accumulation_steps": micro_batches}
    return arguments, {"task": task, "dropout_prob": 0.0, "dtype": dtype}


TASKS = pytest.mark.parametrize("task", [pytest.param("SOP", marks=pytest.mark.slow), "ICT"])


@TASKS
@pytest.mark.parametrize(
    ("ranks", "micro_batches"),
    [(2, 2), (4, 1), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.slow)],
)
@ENGINES
def test_any_split_of_a_step_gives_the_same_gradient(
    tmp_path, one_process, two_ranks, four_ranks, case, ranks, micro_batches, task
):
    """In float64, where the engine can."""
    dtype = torch.float32 if "fairscale" in case.name and (case.zero == 3 or case.auto_wrap) else torch.float64
    whole = gradient(one_process(*one_step(task, dtype, 1)))
    assert all(tensor.dtype == dtype and tensor.abs().max() > 0 for name, tensor in whole.items() if "key" not in name)
    arguments, run = one_step(task, dtype, micro_batches)
    pool = {2: two_ranks, 4: four_ranks}[ranks]
    pool(train_on_a_rank, str(tmp_path), {**arguments, **case._asdict()}, run)
    assert_close(gradient(tmp_path), whole, rtol=1e-4, atol=2e-6)  # losses are float32 whatever the model


@TASKS
def test_micro_batches_of_one_process_give_the_same_gradient(one_process, task):
    whole, split = (gradient(one_process(*one_step(task, torch.float64, micro_batches))) for micro_batches in (1, 4))
    assert_close(split, whole, rtol=1e-4, atol=2e-6)


@ENGINES
def test_a_resumed_run_equals_one_without_interruption(tmp_path, two_ranks, case):
    """To the bit, with dropout, and in the middle of an epoch; and a save on the way changes nothing."""
    arguments = {"num_steps": 5, "save_total_limit": 3, **case._asdict()}
    two_ranks(train_on_a_rank, str(tmp_path / "whole"), {**arguments, "save_steps": 2}, {})
    going_on = {"save_steps": 0, "resume": str(tmp_path / "whole/run/checkpoints/step-00000002")}
    two_ranks(train_on_a_rank, str(tmp_path / "resumed"), {**arguments, **going_on}, {})
    assert_same_bits(checkpoint(tmp_path / "resumed", 5), checkpoint(tmp_path / "whole", 5))
    assert curve(tmp_path / "resumed", "train/loss").tolist() == curve(tmp_path / "whole", "train/loss")[2:].tolist()


@ENGINES_WITH_MUON
def test_a_resumed_run_with_muon_equals_one_without_interruption(tmp_path, two_ranks, case):
    """To the bit; a matrix has one moment."""
    arguments = {"num_steps": 4, "save_total_limit": 3, **case._asdict()}
    two_ranks(train_on_a_rank, str(tmp_path / "whole"), {**arguments, "save_steps": 2}, {})
    going_on = {"save_steps": 0, "resume": str(tmp_path / "whole/run/checkpoints/step-00000002")}
    two_ranks(train_on_a_rank, str(tmp_path / "resumed"), {**arguments, **going_on}, {})
    resumed = checkpoint(tmp_path / "resumed", 4)
    assert_same_bits(resumed, checkpoint(tmp_path / "whole", 4))
    matrix, table = "encoder.stack.attentions.0.o_proj.weight", "encoder.embeddings.word_embeddings.weight"
    assert f"exp_avg/{matrix}" in resumed and f"exp_avg_sq/{matrix}" not in resumed
    assert f"exp_avg_sq/{table}" in resumed


def test_a_checkpoint_goes_on_under_any_other_engine(tmp_path, two_ranks, four_ranks):
    """2 x zero 3 fairscale -> 1 x zero 0 -> 2 x zero 2 torch -> ..., as one process that was never interrupted."""
    run, arguments = {"dropout_prob": 0.0}, {"save_steps": 0, "scheduler_num_steps": 14, "save_total_limit": 9}
    train_on_a_rank(str(tmp_path / "whole"), {**arguments, "num_steps": 14}, run)
    stages = [
        (two_ranks, 2, Case(3, "fairscale", auto_wrap=True), 2),
        (None, 1, Case(0, "torch", auto_wrap=False), 4),
        (two_ranks, 2, Case(2, "torch", auto_wrap=False), 1),
        (four_ranks, 4, Case(1, "fairscale", auto_wrap=False), 2),
        (two_ranks, 2, Case(2, "fairscale", auto_wrap=False), 2),
        (four_ranks, 4, Case(3, "torch", auto_wrap=True), 1),
        (two_ranks, 2, Case(1, "torch", auto_wrap=False), 2),
    ]
    for number, (ranks, processes, case, micro_batches) in enumerate(stages, start=1):
        stage = {"num_steps": 2 * number, "resume": "auto", "gradient_accumulation_steps": micro_batches}
        stage["train_batch_size"] = ROWS_PER_STEP // processes // micro_batches  # so that the order stays
        everything = (str(tmp_path / "stages"), {**arguments, **case._asdict(), **stage}, run)
        train_on_a_rank(*everything) if ranks is None else ranks(train_on_a_rank, *everything)
    np.testing.assert_allclose(
        curve(tmp_path / "stages", "train/loss"), curve(tmp_path / "whole", "train/loss"), rtol=0, atol=1e-5
    )
    assert_close(checkpoint(tmp_path / "stages", 14), checkpoint(tmp_path / "whole", 14), rtol=1e-3, atol=2e-6)
    positions = [
        json.loads((tmp_path / name / "run/checkpoints/step-00000014/state.json").read_text())["position"]
        for name in ("whole", "stages")
    ]
    assert positions[0] == positions[1]


def overflow_on_a_rank(output_dir: str, arguments: dict) -> list[float]:
    """An fp16 run in which the loss of rank 1 overflows once; returns this rank's parameters at the end."""
    import torch.distributed as dist
    from small_runs import OBJECTIVES

    class OverflowsOnce(OBJECTIVES["SOP"]):
        calls = 0

        def loss(self, batch, number, step):
            loss, terms = super().loss(batch, number, step)
            OverflowsOnce.calls += 1
            factor = 1e35 if dist.get_rank() == 1 and OverflowsOnce.calls == 3 else 1.0
            return loss + (loss - loss.detach()) * (factor - 1), terms

    reset_accelerate()
    sums = []

    def evaluate(engine):
        sums.extend(float(tensor.double().sum()) for _, tensor in engine.whole_parameters())
        return {}

    run_small(build_arguments(output_dir, **arguments), objective_class=OverflowsOnce, evaluate=evaluate)
    return sums


@ENGINES
def test_all_ranks_skip_a_step_whose_gradient_overflows_on_one(tmp_path, two_ranks, case):
    arguments = {"num_steps": 3, "fp16": True, **case._asdict()}
    first, second = two_ranks(overflow_on_a_rank, str(tmp_path), arguments)
    assert first == second and np.isfinite(first).all()
    state = json.loads((tmp_path / "run/checkpoints/step-00000003/state.json").read_text())
    assert state["scaler"] == {"scale": 2.0**15, "steps_since_change": 2, "skipped_in_a_row": 0}
    # Three steps were made of four global batches.
    assert state["position"] == {"epoch": 1, "window": 0, "batch": 0, "step_in_epoch": 0}
