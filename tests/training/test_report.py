import pytest
from torch.utils.tensorboard import SummaryWriter

from mixlm.errors import UserError
from mixlm.training import report
from mixlm.training.report import plot_curves, read_curves

PNG = b"\x89PNG\r\n\x1a\n"


def write_events(folder, number, points):
    """An event file named as if it was begun at second `number`: files are read in that order."""
    before = set(folder.rglob("events.*"))
    with SummaryWriter(folder) as writer:
        for tag, step, value in points:
            writer.add_scalar(tag, value, step)
    (path,) = set(folder.rglob("events.*")) - before
    path.rename(folder / f"events.out.tfevents.{number:010d}.host")


def test_a_resumed_curve_has_each_step_once_with_its_newest_value(tmp_path):
    folder = tmp_path / "tensorboard"
    write_events(folder, 1, [("train/loss", step, 1.0) for step in (1, 2, 3, 4)])
    write_events(folder, 2, [("train/loss", step, 2.0) for step in (3, 4, 5)] + [("eval/mlm_loss", 5, 7.0)])
    assert read_curves(tmp_path) == {
        "train/loss": [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)],
        "eval/mlm_loss": [(5, 7.0)],
    }


def test_more_points_than_tensorboard_keeps_by_default(tmp_path):
    write_events(tmp_path, 1, [("train/loss", step, float(step)) for step in range(12_000)])
    assert len(read_curves(tmp_path)["train/loss"]) == 12_000


def test_a_folder_without_curves_has_none(tmp_path):
    assert read_curves(tmp_path) == read_curves(tmp_path / "absent") == {}


def test_the_curves_of_a_real_run_make_a_picture(make_arguments, run_training, tmp_path):
    pytest.importorskip("matplotlib")
    runs = {}
    for family in ("mixlm", "switch"):
        arguments = make_arguments(model_name=family, num_steps=2)
        run_training(arguments, family=family)
        runs[family] = read_curves(arguments.run_folder)
    tags = {"train/lr", "train/loss", "train/mlm_loss", "train/sop_loss", "train/aux_loss", "train/grad_norm"}
    assert tags | {"train/tokens_per_second", "eval/parameters"} == set(runs["mixlm"])
    assert {"train/expert_0_share", "train/expert_2_share", "train/dropped_share"} < set(runs["switch"])
    for name, chosen in (("one", ["switch"]), ("both", ["mixlm", "switch"])):
        out = tmp_path / "pictures" / f"{name}.png"
        plot_curves({label: runs[label] for label in chosen}, out)
        assert out.read_bytes().startswith(PNG) and out.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([{"reading": 2.0, "aux": 0.0}], ["reading: loss (nats)"]),
        ([{"reading": 2.0, "aux": 1.0}], ["total loss (nats)", "reading: loss (nats)", "router losses"]),
        (
            [{"mlm": 2.0}, {"mlm": 2.0, "aux": 1.0}],
            ["masked tokens: loss (nats)", "total loss (nats)", "router losses"],
        ),
    ],
)
def test_the_total_is_drawn_where_a_run_has_several_losses(tmp_path, monkeypatch, losses, expected):
    pytest.importorskip("matplotlib")
    titles = []
    monkeypatch.setattr(
        report, "_save", lambda figure, *rest: titles.extend(axis.get_title() for axis in figure.axes if axis.lines)
    )
    runs = {
        f"run {number}": {
            "train/loss": [(1, sum(of_run.values()))],
            **{f"train/{name}_loss": [(1, value)] for name, value in of_run.items()},
        }
        for number, of_run in enumerate(losses)
    }
    plot_curves(runs, tmp_path / "picture.png")
    assert titles == expected


def test_a_picture_that_cannot_be_written_is_named(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        plot_curves({"run": {"train/loss": [(1, 1.0)]}}, tmp_path / "file" / "picture.png")
