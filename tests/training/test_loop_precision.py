"""Runs in 16 bits, and the loss scale of fp16."""

import math
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from small_runs import CountsSteps, NotANumberAt, assert_same_checkpoint
from torch import nn

from mixlm.errors import UserError
from mixlm.training import loop
from mixlm.training.checkpoint import read_state
from mixlm.training.objectives import SentenceOrderObjective
from mixlm.training.optimization import learning_rate_factor
from mixlm.training.precision import LossScale
from mixlm.training.report import read_curves


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")])
def test_matrix_products_are_in_the_asked_precision(
    make_arguments, run_training, make_rows, checkpoint_folder, precision, dtype
):
    seen = set()

    class Watching(SentenceOrderObjective):
        def __init__(self, accelerator, engine):
            super().__init__(accelerator, engine)
            for module in engine.module.modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_hook(lambda module, _, out: seen.add((module.training, out.dtype)))

    arguments = make_arguments(**({} if precision == "fp32" else {precision: True}))
    reference = make_arguments(model_name="fp32")
    run_training(
        arguments,
        objective_class=Watching,
        evaluate=lambda engine: {"loss": engine(**make_rows("SOP", range(4))).loss.item()},
    )
    run_training(reference)
    assert seen == {(True, getattr(torch, dtype)), (False, getattr(torch, dtype))}
    saved = [load_file(path) for path in checkpoint_folder(arguments, 6).rglob("*.safetensors")]
    assert len(saved) == 2
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for file in saved for tensor in file.values())
    found, expected = (
        [value for _, value in read_curves(each.run_folder)["train/loss"]] for each in (arguments, reference)
    )
    assert found == pytest.approx(expected, rel=0.02)
    assert (found == expected) == (precision == "fp32")


def test_the_loss_scale_is_not_in_the_gradient_that_is_shown_clipped_and_kept(
    make_arguments, run_training, checkpoint_folder
):
    """AdamW's updates would not tell: they are the same for a gradient of any length."""
    norms = []
    for precision in ({}, {"fp16": True}):
        arguments = make_arguments(model_name=f"run-{len(norms)}", num_steps=1, max_grad_norm=0.1, **precision)
        run_training(arguments)
        ((_, norm),) = read_curves(arguments.run_folder)["train/grad_norm"]
        norms.append(norm)
        moments = load_file(checkpoint_folder(arguments, 1) / "optimizer.safetensors")
        first = torch.cat([value.flatten() for name, value in moments.items() if name.startswith("exp_avg/")])
        assert float(first.norm()) == pytest.approx((1 - 0.9) * 0.1, rel=1e-3)
    assert norms[1] == pytest.approx(norms[0], rel=0.02) and norms[0] > 0.1


def test_the_precision_of_the_launcher_is_taken(make_arguments, run_training, checkpoint_folder, monkeypatch):
    asked, told = make_arguments(model_name="asked", num_steps=2), make_arguments(num_steps=2, fp16=True)
    run_training(told)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    run_training(asked)
    assert_same_checkpoint(checkpoint_folder(asked, 2), checkpoint_folder(told, 2))
    assert read_state(checkpoint_folder(asked, 2))["arguments"]["fp16"] is True


def test_an_fp16_overflow_skips_the_step_but_not_the_learning_rate(
    make_arguments, run_training, checkpoint_folder, monkeypatch, capsys
):
    monkeypatch.setattr(loop, "LossScale", partial(LossScale, initial=2.0**40))
    seen = []

    class Counting(CountsSteps):
        def at_step(self, number):
            seen.append(number)

    arguments = make_arguments(num_steps=4, warmup_steps=2, fp16=True)
    run_training(arguments, objective_class=Counting)
    skipped = len(seen) - 4
    assert 5 < skipped < 30
    lines = [line for line in capsys.readouterr().out.splitlines() if "overflowed" in line]
    assert lines == [
        f"step 1: the fp16 gradient overflowed; skipped, and the loss scale is now {2.0 ** (39 - number):g}"
        for number in range(skipped)
    ]
    curve = read_curves(arguments.run_folder)["train/lr"]
    assert curve == [(step + 1, pytest.approx(3e-3 * learning_rate_factor(step, 2, 4))) for step in range(4)]
    folder = checkpoint_folder(arguments, 4)
    steps = [value for name, value in load_file(folder / "optimizer.safetensors").items() if name.startswith("step/")]
    assert steps and all(float(step) == 4 for step in steps)
    state = read_state(folder)
    assert state["scaler"] == {"scale": 2.0 ** (40 - skipped), "steps_since_change": 4, "skipped_in_a_row": 0}
    # 4 steps an epoch: the data of skipped steps is not seen again.
    assert 4 * state["position"]["epoch"] + state["position"]["step_in_epoch"] == len(seen)


def test_a_run_goes_on_in_another_precision(make_arguments, run_training, checkpoint_folder):
    for step, precision in enumerate(({}, {"fp16": True}, {"bf16": True}, {"fp16": True}), start=1):
        arguments = make_arguments(num_steps=step, resume="auto", **precision)
        run_training(arguments)
        assert (read_state(checkpoint_folder(arguments, step))["scaler"] is None) == ("fp16" not in precision)


def test_a_skipped_step_leaves_nothing_behind(make_arguments, run_training):
    class OverflowAtFirst(CountsSteps):
        def __init__(self, accelerator, engine):
            super().__init__(accelerator, engine)
            self.before = {name: parameter.detach().clone() for name, parameter in engine.parameters.items()}
            next(iter(engine.parameters.values())).register_hook(
                lambda gradient: gradient * math.inf if self.done == 1 else gradient
            )

        def at_step(self, number):
            if number == 2:
                assert not self.engine.gradients() and not self.engine.optimizer.state
                for name, parameter in self.engine.parameters.items():
                    assert torch.equal(parameter, self.before[name]), name

    arguments = make_arguments(num_steps=2, fp16=True)
    run_training(arguments, objective_class=OverflowAtFirst)
    assert [step for step, _ in read_curves(arguments.run_folder)["train/loss"]] == [1, 2]


def test_an_fp16_run_stops_after_30_skipped_steps(make_arguments, run_training, monkeypatch, capsys):
    monkeypatch.setattr(loop, "LossScale", partial(LossScale, initial=2.0**200))
    with pytest.raises(UserError, match="^step 1: the fp16 gradient overflowed 30 times in a row; .*--bf16; no check"):
        run_training(make_arguments(fp16=True))
    assert capsys.readouterr().out.count("overflowed; skipped") == 30


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_fp16_loss_that_is_not_a_number_is_no_overflow(make_arguments, run_training, capsys):
    with pytest.raises(UserError, match="^step 4: the loss or its gradient is not a number"):
        run_training(make_arguments(fp16=True), objective_class=NotANumberAt)
    assert "overflowed" not in capsys.readouterr().out
