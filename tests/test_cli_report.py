"""`mixlm report` as a person uses it."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from mixlm.cli import main
from mixlm.evaluation.reading_report import JudgedQuestion

pytest.importorskip("matplotlib")

QUESTIONS = [
    JudgedQuestion("1", "누가 왔는가?", ["세종"], "세종", 1, True, 1.0, 1.0, "correct"),
    JudgedQuestion("2", "언제인가?", ["1997년"], "1997", 2, False, 0.0, 0.5, "unit"),
]


def report(*arguments: str | Path) -> None:
    main(["report", *map(str, arguments)])


def evaluated(folder: Path) -> Path:
    """A run's folder as --do_eval alone leaves it."""
    folder.mkdir(parents=True)
    (folder / "eval_results.json").write_text("{}")
    lines = [json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in QUESTIONS]
    (folder / "questions.jsonl").write_text("".join(lines), "utf-8")
    return folder


def trained(folder: Path) -> Path:
    with SummaryWriter(folder / "tensorboard") as writer:
        writer.add_scalar("train/loss", 1.0, 1)
    return folder


def test_a_run_without_training_has_tables_and_no_curves(tmp_path, capsys):
    report(evaluated(tmp_path / "run"))
    printed = capsys.readouterr().out
    assert "EM          50.0  %\n" in printed and "EM ceiling  50.0  %" in printed
    assert "who                    1  100.0  100.0  누구\n" in printed
    assert "unit             1   50.0%     100.0%   50.0  a unit" in printed
    assert (tmp_path / "run" / "reading.png").is_file() and not (tmp_path / "run" / "curves.png").exists()


def test_a_pretraining_run_has_curves_and_no_tables(tmp_path, capsys):
    report(trained(tmp_path / "run"))
    printed = capsys.readouterr().out
    assert "train/loss" in printed and "EM" not in printed
    assert (tmp_path / "run" / "curves.png").is_file() and not (tmp_path / "run" / "reading.png").exists()


def test_the_folder_of_several_seeds_stands_for_them(tmp_path, capsys):
    for seed in (10, 9):
        trained(evaluated(tmp_path / "out" / f"seed-{seed}"))
    report(tmp_path / "out")
    printed = capsys.readouterr().out
    assert printed.index("seed-9\n") < printed.index("seed-10\n")
    assert (tmp_path / "out" / "curves.png").is_file() and (tmp_path / "out" / "seed-9" / "reading.png").is_file()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "run: no curves and no questions.jsonl there; give a run's folder"),
        (lambda folder: folder.mkdir(), "run: no curves and no questions.jsonl there; give a run's folder"),
        (lambda folder: (evaluated(folder) / "questions.jsonl").write_text("{"), "questions.jsonl, line 1, column 2"),
        (lambda folder: (evaluated(folder) / "reading.png").mkdir(), "reading.png: cannot be written"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, capsys, prepare, message):
    prepare(tmp_path / "run")
    with pytest.raises(SystemExit) as exit_:
        report(tmp_path / "run")
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and message in said and said.count("\n") == 1
