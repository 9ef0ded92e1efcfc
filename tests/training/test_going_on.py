"""Runs that go on from a checkpoint in unusual ways."""

import json
import shutil
import signal

import pytest
from safetensors.torch import load_file
from small_runs import signalled_at
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mixlm.errors import RunStopped, UserError
from mixlm.training import loop as loop_module
from mixlm.training.checkpoint import Evaluation
from mixlm.training.report import read_curves
from mixlm.training.run import finish_run, prepare_run


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def weights(folder):
    return load_file(folder / "model.safetensors")


def finish(arguments):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    accelerator = prepare_run(arguments)
    finish_run(tokenizer, Evaluation(arguments.num_steps, {"x": 1.0}), arguments, accelerator)
    accelerator.end_training()


def assert_same(found, expected):
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)


def test_a_run_that_begins_with_another_ones_last_checkpoint_has_one_of_its_own(
    make_arguments, run_training, checkpoint_folder
):
    first = make_arguments(model_name="first", num_steps=2)
    run_training(first)
    second = make_arguments(model_name="second", num_steps=2, resume=str(checkpoint_folder(first, 2)))
    run_training(second)
    assert names(second.run_folder) == ["step-00000002"]
    finish(make_arguments(model_name="second", num_steps=2, resume="auto"))
    assert_same(weights(second.run_folder), weights(checkpoint_folder(first, 2) / "model"))


def test_the_finished_model_is_that_of_the_last_step_and_not_a_later_one_that_lies_there(
    make_arguments, run_training, checkpoint_folder
):
    arguments = make_arguments(num_steps=4, save_steps=2)
    run_training(arguments)
    back = make_arguments(num_steps=2, resume=str(checkpoint_folder(arguments, 2)))
    run_training(back)
    finish(back)
    assert_same(weights(back.run_folder), weights(checkpoint_folder(arguments, 2) / "model"))


def test_going_back_and_on_to_the_same_step_saves_again(make_arguments, run_training, checkpoint_folder):
    arguments = make_arguments(num_steps=4, save_steps=2, scheduler_num_steps=9)
    run_training(arguments)
    before = weights(checkpoint_folder(arguments, 4) / "model")
    other = {"learning_rate": 1e-2, "resume": str(checkpoint_folder(arguments, 2))}
    run_training(make_arguments(num_steps=4, save_steps=0, scheduler_num_steps=9, **other))
    after = weights(checkpoint_folder(arguments, 4) / "model")
    assert any(not after[name].equal(before[name]) for name in before)


def test_a_checkpoint_of_another_run_and_overwriting_leave_nothing_of_what_was_there(
    make_arguments, run_training, checkpoint_folder
):
    first, second = make_arguments(model_name="first", num_steps=2), make_arguments(model_name="second", num_steps=1)
    run_training(first)
    run_training(second)
    (second.run_folder / "config.json").write_text("older")
    again = {"resume": str(checkpoint_folder(first, 2)), "overwrite_output_dir": True}
    run_training(make_arguments(model_name="second", num_steps=3, **again))
    assert names(second.run_folder) == ["step-00000003"]
    assert not (second.run_folder / "config.json").exists()
    assert [step for step, _ in read_curves(second.run_folder)["train/loss"]] == [3]


def test_an_evaluation_that_was_due_when_the_run_was_stopped_is_made_when_it_goes_on(make_arguments, run_training):
    common = {"num_steps": 4, "eval_steps": 2}
    evaluated = []
    with pytest.raises(RunStopped):
        run_training(
            make_arguments(**common),
            objective_class=signalled_at(2, signal.SIGTERM),
            evaluate=lambda engine: evaluated.append(1) or {},
        )
    assert evaluated == []
    arguments = make_arguments(**common, resume="auto")
    run_training(arguments, evaluate=lambda engine: evaluated.append(1) or {"x": float(len(evaluated))})
    assert read_curves(arguments.run_folder)["eval/x"] == [(2, 1.0), (4, 2.0)]
    state = json.loads((arguments.run_folder / "checkpoints/step-00000004/state.json").read_text())
    assert state["evaluation_due"] is False


def test_an_older_checkpoint_that_cannot_be_deleted_does_not_end_the_run(
    make_arguments, run_training, monkeypatch, capfd
):
    def refuse(folder, kept):
        if len(kept) == 2:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(loop_module, "prune", refuse)
    arguments = make_arguments(num_steps=3, save_steps=1, save_total_limit=3)
    run_training(arguments)
    assert "Permission denied" in capfd.readouterr().out
    assert len(names(arguments.run_folder)) == 3
    shutil.rmtree(arguments.run_folder)


def test_a_copy_of_a_checkpoint_inside_the_run_folder_deletes_nothing(make_arguments, run_training, checkpoint_folder):
    arguments = make_arguments(num_steps=2, save_steps=1)
    run_training(arguments)
    copy = arguments.run_folder / "backup" / "step-00000001"
    shutil.copytree(checkpoint_folder(arguments, 1), copy)
    with pytest.raises(UserError, match="an earlier run is there"):
        run_training(make_arguments(num_steps=2, resume=str(copy)))
    assert names(arguments.run_folder) == ["step-00000001", "step-00000002"]
