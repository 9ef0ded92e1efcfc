"""What a checkpoint holds, and saves that fail."""

import errno
import json
import shutil
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError
from small_runs import assert_same_checkpoint, checkpoint_names

from mixlm.errors import UserError
from mixlm.training import checkpoint as checkpoint_module
from mixlm.training import tracking
from mixlm.training.report import read_curves


def test_the_checkpoint_holds_the_resolved_arguments(make_arguments, run_training, checkpoint_folder):
    arguments = make_arguments(num_steps=1)
    run_training(arguments)
    state = json.loads((checkpoint_folder(arguments, 1) / "state.json").read_text("utf-8"))
    data = state["arguments"].pop("data")
    assert state["arguments"] == {**arguments.to_dict(), "processes": 1} and len(data) == 16
    assert state["arguments"]["scheduler_num_steps"] == 1 and state["scaler"] is None


def test_what_a_killed_save_has_left_is_deleted_with_the_next_one(make_arguments, run_training, checkpoint_folder):
    arguments = make_arguments(num_steps=2)
    run_training(arguments)
    folder = arguments.run_folder / "checkpoints"
    for name in (".step-00000003.partial", "step-00000003"):
        (folder / name / "model").mkdir(parents=True)
    run_training(make_arguments(num_steps=4, resume="auto"))
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000004"]


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
    assert checkpoint_names(arguments.run_folder) == ["step-00000002", "step-00000004"]


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
    assert checkpoint_names(arguments.run_folder) == ["step-00000002", "step-00000006"]
    assert_same_checkpoint(checkpoint_folder(arguments, 6), checkpoint_folder(whole, 6))


def test_a_full_disk_when_a_run_is_stopped_is_an_error(make_arguments, run_training, full_disk):
    full_disk(1)
    with pytest.raises(UserError, match="step-00000001: .*no checkpoint was written yet"):
        run_training(make_arguments(max_minutes=1e-9))


def test_what_cannot_be_written_for_another_reason_needs_no_room(make_arguments, run_training, monkeypatch):
    def fail(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint_module, "save_file", fail)
    with pytest.raises(UserError, match="cannot be written: Permission denied; no checkpoint was written yet"):
        run_training(make_arguments(num_steps=1))


class RoomFor:
    """A file of TensorBoard's on a disk with so many bytes of room: what is beyond is not written."""

    room = 0

    def __init__(self, file):
        self.file = file

    def write(self, data):
        written = self.file.write(data[: RoomFor.room])
        RoomFor.room -= written
        if written < len(data):
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self):
        self.file.flush()

    def close(self):
        self.file.close()


def test_curves_that_cannot_be_written_do_not_stop_the_run(make_arguments, run_training, monkeypatch, capsys):
    """The disk fills in the middle of a record of step 3, and has room again from step 5 on."""
    records, log = tracking.RecordWriter, tracking.Progress.log
    monkeypatch.setattr(tracking, "RecordWriter", lambda file: records(RoomFor(file)))

    def log_with_room(progress, step, *others):
        RoomFor.room = {3: 40, 4: 0}.get(step, 10_000)
        log(progress, step, *others)

    monkeypatch.setattr(tracking.Progress, "log", log_with_room)
    arguments = make_arguments(num_steps=6)
    run_training(arguments)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "cannot be written" in line]
    assert line == (
        f"{arguments.run_folder / 'tensorboard'}: curves cannot be written: No space left on device; make room; "
        "training goes on, and its curves when they can"
    )
    assert [step for step, _ in read_curves(arguments.run_folder)["train/loss"]] == [1, 2, 5, 6]
    assert len(list((arguments.run_folder / "tensorboard").iterdir())) == 2


def test_curves_of_runs_within_a_second_are_read_in_their_order(tmp_path):
    for step in range(12):
        writer = tracking.CurveWriter(tmp_path, first_step=step)
        assert writer.write({"train/loss": 1.0 + step}, step + 1) == writer.write({"train/loss": 0.0}, step + 2) == ""
        writer.close()
    assert read_curves(tmp_path)["train/loss"] == [*((step, float(step)) for step in range(1, 13)), (13, 0.0)]
