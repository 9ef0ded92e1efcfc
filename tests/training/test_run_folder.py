"""What a run finds in its folder, and what goes wrong there."""

import os
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from small_runs import build_arguments, reset_accelerate, run_small

from mixlm.errors import UserError
from mixlm.training import checkpoint as checkpoint_module
from mixlm.training import loop, run
from mixlm.training.run import on_main_process, prepare_run, remove_earlier_run, say


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


def test_tasks_that_do_not_know_of_each_other_do_not_train(tmp_path, monkeypatch):
    reset_accelerate()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UserError, match="^SLURM_STEP_NUM_TASKS=2: each of 2 tasks would train alone; .* torchrun"):
        prepare_run(build_arguments(str(tmp_path)))
    assert names(tmp_path) == set()


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_tasks_that_know_of_each_other_and_single_ones_train(monkeypatch, variable):
    for tasks, processes in (("2", 2), ("1", 1), ("", 1)):
        monkeypatch.setenv(variable, tasks)
        run._require_that_tasks_have_met(processes)
    monkeypatch.setenv(variable, "2")
    with pytest.raises(UserError, match=f"^{variable}=2: "):
        run._require_that_tasks_have_met(processes=1)


@pytest.mark.parametrize("is_shared", [True, False])
def test_all_ranks_see_one_folder(tmp_path, monkeypatch, is_shared):
    """The other rank is on a machine where what the main process has written is not, or is that of another time."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    (here / run.PROBE).write_text("of this run")
    there.mkdir()
    (there / run.PROBE).write_text("of another run")
    monkeypatch.setattr(run, "SECONDS_TO_BE_SEEN", 0.2)

    def gather(own: list[bool]) -> list[bool]:
        content = (here / run.PROBE).read_text()
        return [*own, run._reads((here if is_shared else there) / run.PROBE, content)]

    monkeypatch.setattr(run, "gather_object", gather)
    ranks = SimpleNamespace(num_processes=2, is_main_process=True)
    with nullcontext() if is_shared else pytest.raises(UserError, match="--output_dir outputs: rank 1 sees another"):
        run._require_one_folder(here, "outputs", "of this run", ranks)
    assert names(here) == set()


def test_ranks_with_other_data_do_not_train(monkeypatch):
    monkeypatch.setattr(loop, "gather_object", lambda own: [*own, own[0], "other"])
    with pytest.raises(UserError, match="^rank 2 has other data than rank 0 \\(other and ours\\); give all machines"):
        loop._require_same_data("ours")
    monkeypatch.setattr(loop, "gather_object", lambda own: own * 3)
    loop._require_same_data("ours")


def test_only_the_main_process_speaks(capsys):
    for is_main in (True, False):
        say(SimpleNamespace(is_main_process=is_main, is_local_main_process=True), f"main: {is_main}")
    assert capsys.readouterr().out == "main: True\n"


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


def test_answers_of_an_earlier_reader_are_removed_too(tmp_path):
    (tmp_path / "predict").mkdir()
    for name in ("predict/predictions.json", "predictions.json", "notes.txt"):
        (tmp_path / name).write_text("")
    remove_earlier_run(tmp_path)
    assert names(tmp_path) == {"notes.txt"}


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
