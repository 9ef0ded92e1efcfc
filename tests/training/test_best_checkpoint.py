"""The best checkpoint by a metric is kept, whatever comes after it."""

import errno

import pytest
import small_runs
from small_runs import build_arguments, run_small

from mixlm.training import loop
from mixlm.training.checkpoint import Evaluation, read_state


class Training:
    """Runs of six steps that are evaluated after every second one, with these scores."""

    def __init__(self, output_dir, monkeypatch):
        self.output_dir, self.found = output_dir, None
        monkeypatch.setattr(small_runs, "train", self._train)

    def _train(self, *arguments):
        self.found = loop.train(*arguments)

    def __call__(self, scores: list[float], **fields) -> Evaluation:
        arguments = build_arguments(
            str(self.output_dir),
            **{"num_steps": 6, "scheduler_num_steps": 6, "eval_steps": 2, "save_steps": 0, **fields},
        )
        arguments.best_metric = "score"
        following = iter(scores)
        run_small(arguments, evaluate=lambda engine: {"score": next(following)})
        assert next(following, None) is None
        return self.found

    @property
    def kept(self) -> list[str]:
        return sorted(path.name for path in (self.output_dir / "run" / "checkpoints").iterdir())


@pytest.fixture
def training(tmp_path, monkeypatch):
    return Training(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("scores", "best", "kept"),
    [
        ([5, 9, 7], 4, ["step-00000004", "step-00000006"]),
        ([5, 7, 9], 6, ["step-00000004", "step-00000006"]),  # what was best is deleted with a later save
        ([9, 5, 7], 2, ["step-00000002", "step-00000006"]),
        ([9, 9, 9], 2, ["step-00000002", "step-00000006"]),  # the first of equals
    ],
)
def test_the_best_is_kept_beside_the_last(training, scores, best, kept):
    assert training(scores, save_total_limit=1) == Evaluation(best, {"score": max(scores)})
    assert training.kept == kept


def test_a_run_that_goes_on_remembers_the_best(training):
    assert training([9, 5], num_steps=4, save_total_limit=1) == Evaluation(2, {"score": 9})
    assert training([5, 7], resume="auto", save_total_limit=1) == Evaluation(2, {"score": 9})
    assert training.kept == ["step-00000002", "step-00000006"]
    assert read_state(training.output_dir / "run" / "checkpoints" / "step-00000006")["best"]["step"] == 2


def test_a_run_that_is_made_longer_remembers_the_best(training):
    """Its last evaluation was made after its last checkpoint, whatever the step, and is made again."""
    assert training([5, 9], num_steps=3, save_total_limit=1) == Evaluation(3, {"score": 9})
    assert training([9, 7, 6], resume="auto", save_total_limit=1) == Evaluation(3, {"score": 9})
    assert training.kept == ["step-00000003", "step-00000006"]


def test_a_best_by_other_data_is_forgotten(training, monkeypatch):
    training([9, 5], num_steps=4)
    rows = small_runs.Rows
    monkeypatch.setattr(small_runs, "Rows", lambda task, size=37: rows(task, size + 1))
    assert training([5, 7], resume="auto") == Evaluation(6, {"score": 7})


def test_a_best_that_is_damaged_is_forgotten_before_the_first_step(training, capsys):
    training([9, 5], num_steps=4)
    folder = training.output_dir / "run" / "checkpoints" / "step-00000002"
    (folder / "optimizer.safetensors").write_bytes(b"damaged")
    assert training([5, 7], resume="auto") == Evaluation(6, {"score": 7})
    assert f"passed over: {folder / 'optimizer.safetensors'}: damaged" in capsys.readouterr().out


def test_a_best_that_was_deleted_is_forgotten(training):
    training([9, 5], num_steps=4)
    folder = training.output_dir / "run" / "checkpoints" / "step-00000002"
    (folder / "state.json").unlink()
    assert training([5, 7], resume="auto") == Evaluation(6, {"score": 7})


def test_a_best_that_cannot_be_written_is_none(training, monkeypatch, capfd):
    real, fails = loop.save_checkpoint, iter([False, True, False])

    def save(*arguments):
        if next(fails):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(loop, "save_checkpoint", save)
    assert training([5, 9, 7]) == Evaluation(6, {"score": 7})
    assert "step-00000004: cannot be written: No space left on device" in "".join(capfd.readouterr())


def test_without_a_metric_the_last_is_chosen(tmp_path, monkeypatch):
    training = Training(tmp_path, monkeypatch)
    arguments = build_arguments(str(tmp_path), num_steps=4, eval_steps=2, save_steps=0)
    run_small(arguments, evaluate=lambda engine: {"score": 1.0})
    assert training.found == Evaluation(4, {"score": 1.0})
    assert training.kept == ["step-00000004"]
