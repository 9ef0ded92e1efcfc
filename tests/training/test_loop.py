import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mixlm.errors import RunStopped, UserError
from mixlm.training import checkpoint as checkpoint_module
from mixlm.training import loop, stopping
from mixlm.training.checkpoint import checkpoints_in, load_checkpoint, read_state
from mixlm.training.objectives import SentenceOrderObjective
from mixlm.training.optimization import learning_rate_factor
from mixlm.training.precision import LossScale
from mixlm.training.report import read_curves
from mixlm.training.run import choose_checkpoint, prepare_run


def names(folder):
    return [path.name for path in checkpoints_in(folder / "checkpoints")]


def curves_without_speed(folder):
    curves = read_curves(folder)
    curves.pop("train/tokens_per_second")
    return curves


def assert_same_checkpoint(found, expected):
    """All numbers of two checkpoint folders are the same to the bit."""
    for file in ("model/model.safetensors", "optimizer.safetensors"):
        assert (found / file).read_bytes() == (expected / file).read_bytes(), file
    for name in ("step", "position", "scaler"):
        assert read_state(found)[name] == read_state(expected)[name], name


class CountsSteps(SentenceOrderObjective):
    """`done` is the number of the step in this process, from 1, skipped ones included."""

    done = 0

    def begin_step(self, micro_batches):
        self.done += 1
        self.at_step(self.done)
        return super().begin_step(micro_batches)

    def at_step(self, number):
        """For a subclass that does something before a step."""


class NotANumberAt(CountsSteps):
    """The loss is NaN from the step `step` on."""

    step = 4

    def loss(self, batch, number, step):
        share, terms = super().loss(batch, number, step)
        return (share * math.nan if self.done >= self.step else share), terms


@pytest.mark.parametrize("family", ["mixlm", "switch"])
@pytest.mark.parametrize("task", ["SOP", "ICT"])
def test_a_resumed_run_equals_one_without_interruption(make_arguments, run_training, checkpoint_folder, family, task):
    """11 steps of 8 of 37 rows: epochs of 4 steps, windows of 2; the break is within a window."""
    settings = {"scheduler_num_steps": 20, "warmup_steps": 2, "save_steps": 7, "eval_steps": 4}
    whole = make_arguments(model_name="whole", num_steps=11, **settings)
    run_training(whole, task, family=family)
    broken = make_arguments(model_name="broken", num_steps=7, **settings)
    run_training(broken, task, family=family)
    resumed = make_arguments(model_name="broken", num_steps=11, resume="auto", **settings)
    torch.manual_seed(1234)  # nothing may depend on what the process did before
    run_training(resumed, task, family=family, initializer_range=0.01)

    assert_same_checkpoint(checkpoint_folder(resumed, 11), checkpoint_folder(whole, 11))
    found, expected = curves_without_speed(resumed.run_folder), curves_without_speed(whole.run_folder)
    assert {tag: points for tag, points in found.items() if tag.startswith("train/")} == {
        tag: points for tag, points in expected.items() if tag.startswith("train/")
    }
    assert [step for step, _ in found["train/loss"]] == list(range(1, 12))
    assert expected["eval/parameters"][-1] == found["eval/parameters"][-1]


def test_a_run_is_repeatable_and_its_seed_matters(make_arguments, run_training, checkpoint_folder):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        arguments = make_arguments(model_name=name, seed=seed, num_steps=2)
        run_training(arguments)
        weights.append((checkpoint_folder(arguments, 2) / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_workers_change_nothing(make_arguments, run_training, checkpoint_folder):
    weights = []
    for workers in (0, 2):
        arguments = make_arguments(model_name=f"workers-{workers}", num_steps=3, num_workers=workers)
        run_training(arguments)
        weights.append((checkpoint_folder(arguments, 3) / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize("task", ["SOP", "ICT"])
def test_accumulation_changes_nothing(make_arguments, run_training, checkpoint_folder, task):
    """Without dropout, 1 x 8 and 2 x 4 rows are the same run."""
    models = []
    for micro_batches in (1, 2):
        arguments = make_arguments(model_name=f"x{micro_batches}", gradient_accumulation_steps=micro_batches)
        models.append(run_training(arguments, task, dropout_prob=0.0))
    for (name, one), (_, two) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        if "key" not in name or "bias" not in name:  # their gradient is rounding alone
            torch.testing.assert_close(one, two, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_the_learning_rate_follows_the_schedule(make_arguments, run_training):
    arguments = make_arguments(num_steps=6, warmup_steps=2, scheduler_num_steps=9)
    run_training(arguments)
    curve = read_curves(arguments.run_folder)["train/lr"]
    expected = [3e-3 * learning_rate_factor(step, 2, 9) for step in range(6)]
    assert [step for step, _ in curve] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in curve] == pytest.approx(expected)


def test_saving_evaluating_and_logging_happen_when_they_are_due(make_arguments, run_training):
    arguments = make_arguments(num_steps=7, save_steps=2, save_total_limit=3, eval_steps=3, logging_steps=2)
    run_training(arguments)
    assert names(arguments.run_folder) == ["step-00000004", "step-00000006", "step-00000007"]
    curves = read_curves(arguments.run_folder)
    assert [step for step, _ in curves["train/loss"]] == [2, 4, 6, 7]
    assert [step for step, _ in curves["eval/parameters"]] == [3, 6, 7]


def test_zero_means_only_at_the_end(make_arguments, run_training):
    arguments = make_arguments(num_steps=3, save_steps=0, eval_steps=0)
    run_training(arguments)
    assert names(arguments.run_folder) == ["step-00000003"]
    assert [step for step, _ in read_curves(arguments.run_folder)["eval/parameters"]] == [3]


def test_evaluation_is_in_evaluation_mode_and_training_goes_on_in_training_mode(make_arguments, run_training):
    modes = []

    def evaluate(engine):
        modes.append(engine.module.training)
        return {}

    model = run_training(make_arguments(num_steps=2, eval_steps=1), evaluate=evaluate)
    assert modes == [False, False] and model.training


def test_a_curve_is_the_mean_since_the_last_point(make_arguments, run_training):
    """All tokens of all steps between two points weigh the same: not a mean of means."""
    each = make_arguments(model_name="each", num_steps=4, logging_steps=1)
    run_training(each, dropout_prob=0.0)
    all_four = make_arguments(model_name="all", num_steps=4, logging_steps=4)
    run_training(all_four, dropout_prob=0.0)
    single = [value for _, value in read_curves(each.run_folder)["train/mlm_loss"]]
    ((step, mean),) = read_curves(all_four.run_folder)["train/mlm_loss"]
    assert step == 4 and min(single) < mean < max(single)
    assert mean == pytest.approx(sum(single) / 4, rel=0.05)


def test_zero_max_grad_norm_never_clips(make_arguments, run_training, checkpoint_folder):
    weights = []
    for name, largest in (("never", 0.0), ("huge", 1e9), ("small", 1e-3)):
        arguments = make_arguments(model_name=name, num_steps=2, max_grad_norm=largest, weight_decay=0.5)
        run_training(arguments)
        weights.append((checkpoint_folder(arguments, 2) / "optimizer.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_checkpoint(
    make_arguments, run_training, make_model, capfd
):
    arguments = make_arguments(num_steps=8, save_steps=3)
    with pytest.raises(UserError) as caught:
        run_training(arguments, objective_class=NotANumberAt)
    message = str(caught.value)
    assert message.startswith("step 4: ") and "\n" not in message
    assert str(arguments.run_folder / "checkpoints") in message and "--learning_rate" in message
    assert capfd.readouterr().err.endswith("\n")  # the progress bar has ended: the error gets its own line
    assert names(arguments.run_folder) == ["step-00000003"]
    model = make_model(dropout_prob=0.2)
    state, _, _ = load_checkpoint(checkpoints_in(arguments.run_folder / "checkpoints")[0], model)
    assert state.step == 3
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    run_training(make_arguments(num_steps=5, resume="auto"))
    assert names(arguments.run_folder)[-1] == "step-00000005"


def test_a_loss_that_is_not_a_number_before_the_first_checkpoint(make_arguments, run_training):
    class AtOnce(NotANumberAt):
        step = 1

    arguments = make_arguments(num_steps=3, save_steps=1)
    with pytest.raises(UserError, match="^step 1: "):
        run_training(arguments, objective_class=AtOnce)
    assert names(arguments.run_folder) == []


def test_resume_never_auto_path_and_missing(make_arguments, run_training, checkpoint_folder):
    accelerator = Accelerator(cpu=True)
    arguments = make_arguments(num_steps=4, save_steps=2)
    assert choose_checkpoint(make_arguments(resume="auto"), accelerator) is None
    run_training(arguments)
    newest, first = checkpoint_folder(arguments, 4), checkpoint_folder(arguments, 2)
    accelerator = Accelerator(cpu=True)
    assert choose_checkpoint(arguments, accelerator) is None
    assert choose_checkpoint(make_arguments(resume="auto"), accelerator) == newest
    assert choose_checkpoint(make_arguments(resume=str(first)), accelerator) == first
    with pytest.raises(UserError, match="--resume nowhere: no such folder"):
        prepare_run(make_arguments(resume="nowhere"))
    with pytest.raises(UserError, match="not a checkpoint"):
        prepare_run(make_arguments(resume=str(arguments.run_folder)))


def test_resume_auto_without_a_checkpoint_starts_anew(make_arguments, run_training, checkpoint_folder):
    """Also where a run was killed before, or while, its first checkpoint was written."""
    once = make_arguments(model_name="once", num_steps=2)
    run_training(once)
    auto = make_arguments(num_steps=2, resume="auto")
    shutil.copytree(once.run_folder / "tensorboard", auto.run_folder / "tensorboard")
    (auto.run_folder / "checkpoints" / ".step-00000002.partial" / "model").mkdir(parents=True)
    run_training(auto)
    assert_same_checkpoint(checkpoint_folder(auto, 2), checkpoint_folder(once, 2))
    assert [path.name for path in (auto.run_folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert curves_without_speed(auto.run_folder) == curves_without_speed(once.run_folder)


def test_resume_auto_without_a_checkpoint_leaves_the_files_of_others(make_arguments, run_training):
    arguments = make_arguments(num_steps=2, resume="auto")
    arguments.run_folder.mkdir(parents=True)
    (arguments.run_folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="an earlier run is there; choose another --model_name"):
        run_training(arguments)


@pytest.mark.parametrize("file", ["optimizer.safetensors", "state.json"])
def test_a_damaged_newest_checkpoint_is_passed_over(make_arguments, run_training, checkpoint_folder, capsys, file):
    settings = {"scheduler_num_steps": 10, "save_steps": 2, "save_total_limit": 3}
    whole = make_arguments(model_name="whole", num_steps=6, **settings)
    run_training(whole)
    run_training(make_arguments(num_steps=4, **settings))
    resumed = make_arguments(num_steps=6, resume="auto", **settings)
    damaged = checkpoint_folder(resumed, 4) / file
    damaged.write_bytes(damaged.read_bytes()[:-3])
    capsys.readouterr()
    run_training(resumed)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"passed over: {damaged}: damaged")
    assert said[1] == f"going on from {checkpoint_folder(resumed, 2)} (step 2)"
    assert names(resumed.run_folder) == ["step-00000002", "step-00000004", "step-00000006"]
    for step in (4, 6):
        assert_same_checkpoint(checkpoint_folder(resumed, step), checkpoint_folder(whole, step))


def test_nothing_but_damaged_checkpoints_is_an_error(make_arguments, run_training, checkpoint_folder):
    arguments = make_arguments(num_steps=4, save_steps=2)
    run_training(arguments)
    for step in (2, 4):
        (checkpoint_folder(arguments, step) / "optimizer.safetensors").unlink()
    with pytest.raises(UserError, match="every checkpoint in .*checkpoints is damaged; .*--overwrite_output_dir"):
        run_training(make_arguments(num_steps=6, resume="auto"))
    named = checkpoint_folder(arguments, 2)
    with pytest.raises(UserError, match=f"^{named}/optimizer.safetensors: damaged or missing"):
        run_training(make_arguments(num_steps=6, resume=str(named)))
    assert names(arguments.run_folder) == ["step-00000002", "step-00000004"]


def test_a_finished_run_is_evaluated_again_and_never_goes_back(make_arguments, run_training, checkpoint_folder):
    """Its process may have died between its last checkpoint and its results."""
    arguments = make_arguments(num_steps=2)
    run_training(arguments)
    weights = checkpoint_folder(arguments, 2) / "model" / "model.safetensors"
    before = weights.read_bytes()
    evaluated = []
    run_training(make_arguments(num_steps=2, resume="auto"), evaluate=lambda engine: evaluated.append(1) or {"x": 1.0})
    assert evaluated == [1] and weights.read_bytes() == before
    with pytest.raises(UserError, match="is at step 2; give --num_steps of that or more"):
        run_training(make_arguments(num_steps=1, resume="auto"))


def test_a_checkpoint_of_another_run_does_not_open_a_used_folder(make_arguments, run_training, checkpoint_folder):
    for name in ("first", "second"):
        run_training(make_arguments(model_name=name, num_steps=2))
    of_first = checkpoint_folder(make_arguments(model_name="first"), 2)
    with pytest.raises(UserError, match="an earlier run is there"):
        run_training(make_arguments(model_name="second", num_steps=3, resume=str(of_first)))


def test_a_new_run_takes_the_older_model_away(make_arguments, run_training):
    arguments = make_arguments(num_steps=2)
    run_training(arguments)
    for name in ("config.json", "model.safetensors", "notes.txt"):
        (arguments.run_folder / name).write_text("older")
    run_training(make_arguments(num_steps=2, overwrite_output_dir=True))
    assert sorted(path.name for path in arguments.run_folder.iterdir()) == ["checkpoints", "notes.txt", "tensorboard"]


def test_another_run_can_begin_with_a_checkpoint(make_arguments, run_training, checkpoint_folder):
    first = make_arguments(model_name="first", num_steps=4, save_steps=2)
    run_training(first)
    other = make_arguments(model_name="other", num_steps=4, resume=str(checkpoint_folder(first, 2)))
    run_training(other)
    one, two = (checkpoint_folder(arguments, 4) / "optimizer.safetensors" for arguments in (first, other))
    assert one.read_bytes() == two.read_bytes()
    assert names(first.run_folder) == ["step-00000002", "step-00000004"]


def test_going_back_to_an_earlier_checkpoint_keeps_what_is_written_then(
    make_arguments, run_training, checkpoint_folder
):
    arguments = make_arguments(num_steps=8, save_steps=2, save_total_limit=3)
    run_training(arguments)
    assert names(arguments.run_folder) == ["step-00000004", "step-00000006", "step-00000008"]
    back = make_arguments(num_steps=5, save_steps=0, save_total_limit=2, resume=str(checkpoint_folder(arguments, 4)))
    run_training(back)
    assert names(arguments.run_folder) == ["step-00000004", "step-00000005"]
    assert choose_checkpoint(make_arguments(resume="auto"), Accelerator(cpu=True)) == checkpoint_folder(arguments, 5)


def test_an_earlier_run_is_refused_or_replaced(make_arguments, run_training):
    arguments = make_arguments(num_steps=2)
    run_training(arguments)
    with pytest.raises(UserError) as caught:
        run_training(arguments)
    message = str(caught.value)
    assert message.startswith(f"{arguments.run_folder}: an earlier run is there")
    assert "--resume auto" in message and "--overwrite_output_dir" in message
    assert names(arguments.run_folder) == ["step-00000002"]
    run_training(make_arguments(num_steps=3, overwrite_output_dir=True))
    assert names(arguments.run_folder) == ["step-00000003"]
    assert [step for step, _ in read_curves(arguments.run_folder)["train/loss"]] == [1, 2, 3]


def test_a_resumed_run_may_have_overwrite_in_its_arguments(make_arguments, run_training):
    run_training(make_arguments(num_steps=2))
    arguments = make_arguments(num_steps=3, resume="auto", overwrite_output_dir=True)
    run_training(arguments)
    assert names(arguments.run_folder) == ["step-00000002", "step-00000003"]


def test_nothing_of_an_earlier_run_is_deleted_before_the_new_one_can_begin(make_arguments, run_training):
    arguments = make_arguments(num_steps=2)
    run_training(arguments)
    with pytest.raises(UserError, match="max_steps_per_epoch"):
        run_training(make_arguments(num_steps=2, overwrite_output_dir=True, max_steps_per_epoch=99))
    assert names(arguments.run_folder) == ["step-00000002"]


def test_an_empty_run_folder_is_no_earlier_run(make_arguments, run_training):
    arguments = make_arguments(num_steps=1)
    arguments.run_folder.mkdir(parents=True)
    run_training(arguments)
    assert names(arguments.run_folder) == ["step-00000001"]


@pytest.mark.parametrize("part", ["", "outputs", "outputs/run"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, make_arguments, part):
    (tmp_path / "file").write_text("")
    output_dir = tmp_path / "file" / part if part else tmp_path / "file"
    with pytest.raises(UserError) as caught:
        prepare_run(make_arguments(output_dir=str(output_dir)))
    assert str(caught.value).startswith(f"--output_dir {output_dir}: cannot be written")
    assert (tmp_path / "file").read_text() == ""


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


def test_zero_on_one_process_says_so_and_trains_as_zero_0(make_arguments, run_training, checkpoint_folder, capsys):
    plain, sharded = make_arguments(num_steps=2), make_arguments(model_name="sharded", num_steps=2, zero=3)
    run_training(plain)
    assert "--zero" not in capsys.readouterr().out
    run_training(sharded)
    assert "--zero 3: one process has nothing to share out; as --zero 0\n" in capsys.readouterr().out
    assert_same_checkpoint(checkpoint_folder(sharded, 2), checkpoint_folder(plain, 2))


def test_max_steps_per_epoch_too_large_names_the_largest(make_arguments, run_training):
    with pytest.raises(UserError, match="use at most 4"):  # 37 rows, 8 to a step
        run_training(make_arguments(max_steps_per_epoch=5))
    run_training(make_arguments(num_steps=5, max_steps_per_epoch=4))


def test_max_steps_per_epoch_ends_the_epoch(make_arguments, run_training, checkpoint_folder):
    arguments = make_arguments(num_steps=5, max_steps_per_epoch=3, save_steps=3)
    run_training(arguments)
    positions = [
        json.loads((checkpoint_folder(arguments, step) / "state.json").read_text())["position"] for step in (3, 5)
    ]
    assert positions[0] == {"epoch": 1, "window": 0, "batch": 0, "step_in_epoch": 0}
    assert (positions[1]["epoch"], positions[1]["step_in_epoch"]) == (1, 2)


def test_the_checkpoint_holds_the_resolved_arguments(make_arguments, run_training, checkpoint_folder):
    arguments = make_arguments(num_steps=1)
    run_training(arguments)
    state = json.loads((checkpoint_folder(arguments, 1) / "state.json").read_text("utf-8"))
    assert state["arguments"] == {**arguments.to_dict(), "processes": 1}
    assert state["arguments"]["scheduler_num_steps"] == 1 and state["scaler"] is None


def test_what_changed_since_the_checkpoint_is_said(make_arguments, run_training, capsys):
    run_training(make_arguments(num_steps=2))
    run_training(make_arguments(num_steps=3, resume="auto", learning_rate=1e-3))
    said = [line.strip() for line in capsys.readouterr().out.splitlines() if "changed since then" in line]
    assert said == [
        "changed since then: learning_rate 0.003 -> 0.001",
        "changed since then: num_steps 2 -> 3",
        "changed since then: scheduler_num_steps 2 -> 3",
    ]


@pytest.fixture(params=["no room", "full while writing", "broken while writing"])
def full_disk(request, monkeypatch):
    """(number) -> from now on the save of that number, from 1, fails, and none before or after it."""

    def fail(*args, **kwargs):
        if request.param == "full while writing":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    def prepare(number):
        saves = iter(range(1, 100))
        save_file, disk_usage = checkpoint_module.save_file, shutil.disk_usage
        if request.param == "no room":
            none = SimpleNamespace(free=0)
            monkeypatch.setattr(shutil, "disk_usage", lambda path: none if next(saves) == number else disk_usage(path))
        else:
            monkeypatch.setattr(
                checkpoint_module, "save_file", lambda *args: (fail if next(saves) == number else save_file)(*args)
            )

    return prepare


CANNOT_BE_WRITTEN = "cannot be written: .*(No space left on device|0 MiB are free)"


def test_a_full_disk_at_the_end_is_an_error_that_keeps_earlier_checkpoints(make_arguments, run_training, full_disk):
    arguments = make_arguments(num_steps=4, save_steps=2)
    full_disk(2)
    with pytest.raises(
        UserError, match=f"step-00000004: {CANNOT_BE_WRITTEN}.*step-00000002: go on with --resume auto"
    ):
        run_training(arguments)
    assert [path.name for path in (arguments.run_folder / "checkpoints").iterdir()] == ["step-00000002"]
    run_training(make_arguments(num_steps=4, save_steps=2, resume="auto"))
    assert names(arguments.run_folder) == ["step-00000002", "step-00000004"]


def test_a_full_disk_on_the_way_does_not_stop_the_run(
    make_arguments, run_training, checkpoint_folder, full_disk, capsys
):
    whole = make_arguments(model_name="whole", save_steps=2)
    run_training(whole)
    full_disk(2)
    arguments = make_arguments(save_steps=2)
    run_training(arguments)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "cannot be written" in line]
    assert line.startswith(f"{checkpoint_folder(arguments, 4)}: ") and "training goes on" in line
    assert names(arguments.run_folder) == ["step-00000002", "step-00000006"]
    assert_same_checkpoint(checkpoint_folder(arguments, 6), checkpoint_folder(whole, 6))


def test_a_full_disk_when_a_run_is_stopped_is_an_error(make_arguments, run_training, full_disk):
    full_disk(1)
    with pytest.raises(UserError, match="step-00000001: .*no checkpoint was written yet"):
        run_training(make_arguments(max_minutes=1e-9))


def test_what_a_killed_save_has_left_is_deleted_with_the_next_one(make_arguments, run_training, checkpoint_folder):
    arguments = make_arguments(num_steps=2)
    run_training(arguments)
    folder = arguments.run_folder / "checkpoints"
    for name in (".step-00000003.partial", "step-00000003"):
        (folder / name / "model").mkdir(parents=True)
    run_training(make_arguments(num_steps=4, resume="auto"))
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000004"]


def test_going_back_keeps_the_ancestor_and_drops_the_abandoned_branch(make_arguments, run_training, checkpoint_folder):
    arguments = make_arguments(num_steps=6, save_steps=2, save_total_limit=3)
    run_training(arguments)
    assert names(arguments.run_folder) == ["step-00000002", "step-00000004", "step-00000006"]
    second = str(checkpoint_folder(arguments, 2))
    run_training(make_arguments(num_steps=7, save_steps=0, save_total_limit=2, resume=second))
    assert names(arguments.run_folder) == ["step-00000002", "step-00000007"]


def test_an_error_before_the_first_checkpoint_does_not_send_its_user_to_one(make_arguments, run_training):
    class NotANumber(NotANumberAt):
        step = 1

    with pytest.raises(UserError, match="no checkpoint was written yet: start again with --overwrite_output_dir"):
        run_training(make_arguments(), objective_class=NotANumber)
    with pytest.raises(UserError, match="an earlier run is there; choose another --model_name"):
        run_training(make_arguments())


@pytest.mark.parametrize("precision", [{}, {"fp16": True}, {"bf16": True}], ids=["fp32", "fp16", "bf16"])
def test_a_run_in_pieces_of_a_step_equals_one_in_one_piece(
    make_arguments, run_training, checkpoint_folder, monkeypatch, precision
):
    # Overflows at first, and grows several times after that.
    monkeypatch.setattr(loop, "LossScale", partial(LossScale, initial=2.0**24, growth_interval=2))
    whole = make_arguments(model_name="whole", num_steps=5, **precision)
    run_training(whole)
    pieces = make_arguments(num_steps=5, resume="auto", max_minutes=1e-9, **precision)
    for step in range(1, 5):
        stopped = f"--max_minutes are over: stopped after step {step}; the last good checkpoint is "
        with pytest.raises(RunStopped) as caught:
            run_training(pieces)
        assert str(caught.value).startswith(f"{stopped}{checkpoint_folder(pieces, step)}: go on with --resume auto")
    run_training(pieces)
    assert_same_checkpoint(checkpoint_folder(pieces, 5), checkpoint_folder(whole, 5))
    found, expected = curves_without_speed(pieces.run_folder), curves_without_speed(whole.run_folder)
    assert found == expected and len(found["train/loss"]) == 5


def test_time_that_is_not_over_stops_nothing(make_arguments, run_training):
    arguments = make_arguments(num_steps=2, max_minutes=60)
    run_training(arguments)
    assert names(arguments.run_folder) == ["step-00000002"]


@pytest.fixture
def handlers():
    """What the signals do before and, whatever happens, after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def signalled_at(step, *numbers):
    """An objective that sends signals to its own process before a step."""

    class Signalled(CountsSteps):
        def at_step(self, number):
            if number == step:
                for each in numbers:
                    os.kill(os.getpid(), each)

    return Signalled


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("times", [1, 2])  # the second time as a launcher's echo
def test_a_signal_saves_stops_and_loses_nothing(
    make_arguments, run_training, checkpoint_folder, handlers, number, times
):
    whole = make_arguments(model_name="whole", num_steps=5)
    run_training(whole)
    with pytest.raises(RunStopped, match=f"^{number.name}: stopped after step 3; .*--resume auto"):
        run_training(make_arguments(num_steps=5), objective_class=signalled_at(3, *[number] * times))
    assert {each: signal.getsignal(each) for each in handlers} == handlers
    resumed = make_arguments(num_steps=5, resume="auto")
    assert names(resumed.run_folder) == ["step-00000003"]
    run_training(resumed)
    assert_same_checkpoint(checkpoint_folder(resumed, 5), checkpoint_folder(whole, 5))


def test_a_signal_during_an_evaluation_stops_after_the_next_step(make_arguments, run_training, handlers):
    def evaluate(engine):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    arguments = make_arguments(eval_steps=2)
    with pytest.raises(RunStopped, match="^SIGTERM: stopped after step 3"):
        run_training(arguments, evaluate=evaluate)
    assert names(arguments.run_folder) == ["step-00000003"]


def test_a_signal_in_the_last_step_stops_nothing(make_arguments, run_training, handlers):
    arguments = make_arguments(num_steps=2, eval_steps=1)
    run_training(arguments, objective_class=signalled_at(2, signal.SIGTERM))
    assert [step for step, _ in read_curves(arguments.run_folder)["eval/parameters"]] == [1, 2]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_signals_do_what_they_did_before_after_an_error_too(make_arguments, run_training, handlers):
    with pytest.raises(UserError):
        run_training(make_arguments(), objective_class=NotANumberAt)
    assert {each: signal.getsignal(each) for each in handlers} == handlers


@pytest.mark.parametrize(
    ("seconds", "second", "expected"),
    [
        (stopping.ECHO_SECONDS + 0.1, signal.SIGTERM, 128 + signal.SIGTERM),
        (stopping.ECHO_SECONDS + 0.1, signal.SIGINT, 128 + signal.SIGINT),
        (stopping.ECHO_SECONDS - 0.1, signal.SIGTERM, 0),
    ],
)
def test_a_second_signal_ends_the_process_unless_it_is_an_echo(seconds, second, expected):
    accelerator = Accelerator(cpu=True)

    def receive_two():
        now = 100.0
        stopping.time = SimpleNamespace(monotonic=lambda: now)
        with stopping.StopRequest(None, accelerator) as request:
            os.kill(os.getpid(), signal.SIGTERM)
            now += seconds
            os.kill(os.getpid(), second)
            os._exit(0 if request.reason() == "SIGTERM" else 1)

    process = multiprocessing.get_context("fork").Process(target=receive_two)
    process.start()
    process.join(60)
    assert process.exitcode == expected
