"""A run whose folder holds an earlier one."""

import pytest
from small_runs import checkpoint_names

from mixlm.errors import UserError
from mixlm.training.report import read_curves
from mixlm.training.run import prepare_run


def test_an_earlier_run_is_refused_or_replaced(make_arguments, run_training):
    arguments = make_arguments(num_steps=2)
    run_training(arguments)
    with pytest.raises(UserError) as caught:
        run_training(arguments)
    message = str(caught.value)
    assert message.startswith(f"{arguments.run_folder}: an earlier run is there")
    assert "--resume auto" in message and "--overwrite_output_dir" in message
    assert checkpoint_names(arguments.run_folder) == ["step-00000002"]
    run_training(make_arguments(num_steps=3, overwrite_output_dir=True))
    assert checkpoint_names(arguments.run_folder) == ["step-00000003"]
    assert [step for step, _ in read_curves(arguments.run_folder)["train/loss"]] == [1, 2, 3]


def test_a_new_run_takes_the_older_model_away(make_arguments, run_training):
    arguments = make_arguments(num_steps=2)
    run_training(arguments)
    for name in ("config.json", "model.safetensors", "notes.txt"):
        (arguments.run_folder / name).write_text("older")
    run_training(make_arguments(num_steps=2, overwrite_output_dir=True))
    assert sorted(path.name for path in arguments.run_folder.iterdir()) == [
        "checkpoints",
        "notes.txt",
        "run.json",
        "tensorboard",
    ]


def test_a_checkpoint_of_another_run_does_not_open_a_used_folder(make_arguments, run_training, checkpoint_folder):
    for name in ("first", "second"):
        run_training(make_arguments(model_name=name, num_steps=2))
    of_first = checkpoint_folder(make_arguments(model_name="first"), 2)
    with pytest.raises(UserError, match="an earlier run is there"):
        run_training(make_arguments(model_name="second", num_steps=3, resume=str(of_first)))


def test_a_resumed_run_may_have_overwrite_in_its_arguments(make_arguments, run_training):
    run_training(make_arguments(num_steps=2))
    arguments = make_arguments(num_steps=3, resume="auto", overwrite_output_dir=True)
    run_training(arguments)
    assert checkpoint_names(arguments.run_folder) == ["step-00000002", "step-00000003"]


def test_nothing_of_an_earlier_run_is_deleted_before_the_new_one_can_begin(make_arguments, run_training):
    arguments = make_arguments(num_steps=2)
    run_training(arguments)
    with pytest.raises(UserError, match="max_steps_per_epoch"):
        run_training(make_arguments(num_steps=2, overwrite_output_dir=True, max_steps_per_epoch=99))
    assert checkpoint_names(arguments.run_folder) == ["step-00000002"]


def test_an_empty_run_folder_is_no_earlier_run(make_arguments, run_training):
    arguments = make_arguments(num_steps=1)
    arguments.run_folder.mkdir(parents=True)
    run_training(arguments)
    assert checkpoint_names(arguments.run_folder) == ["step-00000001"]


@pytest.mark.parametrize("part", ["", "outputs", "outputs/run"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, make_arguments, part):
    (tmp_path / "file").write_text("")
    output_dir = tmp_path / "file" / part if part else tmp_path / "file"
    with pytest.raises(UserError) as caught:
        prepare_run(make_arguments(output_dir=str(output_dir)))
    assert str(caught.value).startswith(f"--output_dir {output_dir}: cannot be written")
    assert (tmp_path / "file").read_text() == ""
