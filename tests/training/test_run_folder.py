"""What a run finds in its folder, and what goes wrong there."""

import os
import shutil

import pytest
from accelerate import Accelerator
from small_runs import build_arguments, reset_accelerate, run_small

from mixlm.errors import UserError
from mixlm.training import checkpoint as checkpoint_module
from mixlm.training.run import on_main_process, prepare_run, remove_earlier_run


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_the_system_refuses_is_one_line_on_every_rank(tmp_path):
    reset_accelerate()
    with pytest.raises(UserError, match=rf"^{tmp_path}/missing: No such file or directory$"):
        on_main_process(Accelerator(cpu=True), lambda: os.unlink(tmp_path / "missing"))


@pytest.mark.parametrize(("kind", "found"), [("file", "a file"), ("nothing", "no such folder")])
def test_a_checkpoint_to_go_on_from_is_a_folder(tmp_path, kind, found):
    path = tmp_path / "step"
    if kind == "file":
        path.write_text("")
    with pytest.raises(UserError, match=f"--resume {path}: {found}; give a checkpoint's folder"):
        prepare_run(build_arguments(str(tmp_path), resume=str(path)))


def test_a_state_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "step" / "state.json").mkdir(parents=True)
    with pytest.raises(UserError, match="state.json: Is a directory; use an older checkpoint"):
        prepare_run(build_arguments(str(tmp_path), resume=str(tmp_path / "step")))


def test_files_of_others_are_not_called_a_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    reset_accelerate()
    with pytest.raises(UserError, match="run: other files are there; choose another --model_name"):
        prepare_run(build_arguments(str(tmp_path)))


@pytest.mark.parametrize("left", [".run.json.partial", ".writable", "tensorboard"])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path, left):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / left).touch()
    reset_accelerate()
    prepare_run(build_arguments(str(tmp_path), resume="auto"))


def test_checkpoints_may_be_a_link_to_another_disk(tmp_path):
    """A new run empties what it points to, and leaves the link and what is not its own."""
    elsewhere = tmp_path / "disk"
    (elsewhere / "mine").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(elsewhere)
    for seed in (1, 2):
        run_small(build_arguments(str(tmp_path), num_steps=2, seed=seed, overwrite_output_dir=True))
        assert names(elsewhere) == {"mine", "step-00000002"}
    assert (tmp_path / "run" / "checkpoints").is_symlink()


def test_a_link_in_place_of_the_curves_is_removed_alone(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "curves").write_text("of another")
    (tmp_path / "tensorboard").symlink_to(tmp_path / "elsewhere")
    remove_earlier_run(tmp_path)
    assert names(tmp_path) == {"elsewhere"} and names(tmp_path / "elsewhere") == {"curves"}


def test_an_older_checkpoint_that_cannot_be_deleted_does_not_stop_the_run(tmp_path, monkeypatch, capfd):
    def refuse(path, *arguments, **more):
        if "partial" in str(path):
            return real(path, *arguments, **more)
        raise PermissionError(1, "Operation not permitted", str(path))

    real = shutil.rmtree
    monkeypatch.setattr(checkpoint_module.shutil, "rmtree", refuse)
    run_small(build_arguments(str(tmp_path), num_steps=3, save_steps=1, save_total_limit=1))
    said = "".join(capfd.readouterr())
    assert "step-00000001: Operation not permitted: an older checkpoint cannot be deleted; training goes on" in said
    assert "cannot be written" not in said
    assert (tmp_path / "run" / "checkpoints" / "step-00000003" / "state.json").is_file()
