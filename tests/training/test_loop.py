import json
import math

import pytest
import torch
from safetensors import SafetensorError

from mixlm.errors import UserError
from mixlm.training import checkpoint as checkpoint_module
from mixlm.training.checkpoint import checkpoints_in, load_checkpoint
from mixlm.training.loop import find_checkpoint, prepare_run
from mixlm.training.objectives import SentenceOrderObjective
from mixlm.training.optimization import build_optimizer, learning_rate_factor
from mixlm.training.report import read_curves


def names(folder):
    return [path.name for path in checkpoints_in(folder / "checkpoints")]


def curves_without_speed(folder):
    curves = read_curves(folder)
    curves.pop("train/tokens_per_second")
    return curves


class NotANumberAt(SentenceOrderObjective):
    """The loss is NaN from the step `step` on."""

    step = 4
    done = 0

    def begin_step(self, micro_batches):
        self.done += 1
        return super().begin_step(micro_batches)

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
    resumed = make_arguments(model_name="broken", num_steps=11, checkpoint="latest", **settings)
    torch.manual_seed(1234)  # nothing may depend on what the process did before
    run_training(resumed, task, family=family, initializer_range=0.01)

    for file in ("model/model.safetensors", "optimizer.safetensors"):
        found = checkpoint_folder(resumed, 11) / file
        assert found.read_bytes() == (checkpoint_folder(whole, 11) / file).read_bytes(), file
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
    arguments = make_arguments(num_steps=7, save_steps=2, keep_checkpoints=3, eval_steps=3, logging_steps=2)
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

    def evaluate(model):
        modes.append(model.training)
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
    optimizer = build_optimizer(model, 1.0, 0.0, 1e-8)
    state, _ = load_checkpoint(checkpoints_in(arguments.run_folder / "checkpoints")[0], model, optimizer)
    assert state.step == 3
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    run_training(make_arguments(num_steps=5, checkpoint="latest"))
    assert names(arguments.run_folder)[-1] == "step-00000005"


def test_a_loss_that_is_not_a_number_before_the_first_checkpoint(make_arguments, run_training):
    class AtOnce(NotANumberAt):
        step = 1

    arguments = make_arguments(num_steps=3, save_steps=1)
    with pytest.raises(UserError, match="^step 1: "):
        run_training(arguments, objective_class=AtOnce)
    assert names(arguments.run_folder) == []


def test_checkpoint_latest_path_and_missing(make_arguments, run_training, checkpoint_folder):
    arguments = make_arguments(num_steps=4, save_steps=2)
    assert find_checkpoint(arguments) is None
    with pytest.raises(UserError, match="--checkpoint latest: no checkpoint in .*checkpoints"):
        find_checkpoint(make_arguments(checkpoint="latest"))
    run_training(arguments)
    latest, first = checkpoint_folder(arguments, 4), checkpoint_folder(arguments, 2)
    assert find_checkpoint(make_arguments(checkpoint="latest")) == latest
    assert find_checkpoint(make_arguments(checkpoint=str(first))) == first
    with pytest.raises(UserError, match="--checkpoint nowhere: no such folder"):
        find_checkpoint(make_arguments(checkpoint="nowhere"))
    with pytest.raises(UserError, match="not a checkpoint"):
        run_training(make_arguments(checkpoint=str(arguments.run_folder)))


def test_a_finished_run_is_evaluated_again_and_never_goes_back(make_arguments, run_training, checkpoint_folder):
    """Its process may have died between its last checkpoint and its results."""
    arguments = make_arguments(num_steps=2)
    run_training(arguments)
    weights = checkpoint_folder(arguments, 2) / "model" / "model.safetensors"
    before = weights.read_bytes()
    evaluated = []
    run_training(
        make_arguments(num_steps=2, checkpoint="latest"), evaluate=lambda model: evaluated.append(1) or {"x": 1.0}
    )
    assert evaluated == [1] and weights.read_bytes() == before
    with pytest.raises(UserError, match="is at step 2; give --num_steps of that or more"):
        run_training(make_arguments(num_steps=1, checkpoint="latest"))


def test_a_checkpoint_of_another_run_does_not_open_a_used_folder(make_arguments, run_training, checkpoint_folder):
    for name in ("first", "second"):
        run_training(make_arguments(model_name=name, num_steps=2))
    of_first = checkpoint_folder(make_arguments(model_name="first"), 2)
    with pytest.raises(UserError, match="an earlier run is there"):
        run_training(make_arguments(model_name="second", num_steps=3, checkpoint=str(of_first)))


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
    other = make_arguments(model_name="other", num_steps=4, checkpoint=str(checkpoint_folder(first, 2)))
    run_training(other)
    one, two = (checkpoint_folder(arguments, 4) / "optimizer.safetensors" for arguments in (first, other))
    assert one.read_bytes() == two.read_bytes()
    assert names(first.run_folder) == ["step-00000002", "step-00000004"]


def test_going_back_to_an_earlier_checkpoint_keeps_what_is_written_then(
    make_arguments, run_training, checkpoint_folder
):
    arguments = make_arguments(num_steps=8, save_steps=2, keep_checkpoints=3)
    run_training(arguments)
    assert names(arguments.run_folder) == ["step-00000004", "step-00000006", "step-00000008"]
    back = make_arguments(
        num_steps=5, save_steps=0, keep_checkpoints=2, checkpoint=str(checkpoint_folder(arguments, 4))
    )
    run_training(back)
    assert names(arguments.run_folder) == ["step-00000004", "step-00000005"]
    assert find_checkpoint(make_arguments(checkpoint="latest")) == checkpoint_folder(arguments, 5)


def test_an_earlier_run_is_refused_or_replaced(make_arguments, run_training):
    arguments = make_arguments(num_steps=2)
    run_training(arguments)
    with pytest.raises(UserError) as caught:
        run_training(arguments)
    message = str(caught.value)
    assert message.startswith(f"{arguments.run_folder}: an earlier run is there")
    assert "--checkpoint latest" in message and "--overwrite_output_dir" in message
    assert names(arguments.run_folder) == ["step-00000002"]
    run_training(make_arguments(num_steps=3, overwrite_output_dir=True))
    assert names(arguments.run_folder) == ["step-00000003"]
    assert [step for step, _ in read_curves(arguments.run_folder)["train/loss"]] == [1, 2, 3]


def test_a_resumed_run_may_have_overwrite_in_its_arguments(make_arguments, run_training):
    run_training(make_arguments(num_steps=2))
    arguments = make_arguments(num_steps=3, checkpoint="latest", overwrite_output_dir=True)
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_fp16_needs_cuda(make_arguments):
    with pytest.raises(UserError, match="--fp16: there is no CUDA device"):
        prepare_run(make_arguments(fp16=True))


def test_bf16_trains(make_arguments, run_training):
    model = run_training(make_arguments(num_steps=2, bf16=True))
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in model.parameters())


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
    run_training(make_arguments(num_steps=3, checkpoint="latest", learning_rate=1e-3))
    said = [line.strip() for line in capsys.readouterr().out.splitlines() if "changed since then" in line]
    assert said == [
        "changed since then: learning_rate 0.003 -> 0.001",
        "changed since then: num_steps 2 -> 3",
        "changed since then: scheduler_num_steps 2 -> 3",
    ]


def test_a_full_disk_is_an_error_that_keeps_earlier_checkpoints(make_arguments, run_training, monkeypatch):
    def fail(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    arguments = make_arguments(num_steps=4, save_steps=2)
    saving = checkpoint_module.save_file
    steps = iter((saving, fail))
    monkeypatch.setattr(checkpoint_module, "save_file", lambda *args, **kwargs: next(steps)(*args, **kwargs))
    with pytest.raises(UserError, match="step-00000004: cannot be written: .*No space left on device"):
        run_training(arguments)
    assert names(arguments.run_folder) == ["step-00000002"]
    monkeypatch.undo()
    run_training(make_arguments(num_steps=4, save_steps=2, checkpoint="latest"))
    assert names(arguments.run_folder) == ["step-00000002", "step-00000004"]


def test_going_back_keeps_the_ancestor_and_drops_the_abandoned_branch(make_arguments, run_training, checkpoint_folder):
    arguments = make_arguments(num_steps=6, save_steps=2, keep_checkpoints=3)
    run_training(arguments)
    assert names(arguments.run_folder) == ["step-00000002", "step-00000004", "step-00000006"]
    second = str(checkpoint_folder(arguments, 2))
    run_training(make_arguments(num_steps=7, save_steps=0, keep_checkpoints=2, checkpoint=second))
    assert names(arguments.run_folder) == ["step-00000002", "step-00000007"]


def test_an_error_before_the_first_checkpoint_does_not_send_its_user_to_one(make_arguments, run_training):
    class NotANumber(NotANumberAt):
        step = 1

    with pytest.raises(UserError, match="no checkpoint was written yet: start again with --overwrite_output_dir"):
        run_training(make_arguments(), objective_class=NotANumber)
    with pytest.raises(UserError, match="an earlier run is there; choose another --model_name"):
        run_training(make_arguments())
