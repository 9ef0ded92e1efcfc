"""What a report shows of a study's results."""

import re
from pathlib import Path

import gains
import pytest
import report
import study
from matplotlib.axes import Axes
from studies import LINE, TASK, kept_models, table


def pretrained(run: dict, loss: float, **more) -> dict:
    """A result of a run, as it is kept."""
    metrics = {"mlm_loss": loss, "mlm_accuracy": 0.5, "sop_accuracy": 1}
    return {"steps": 10, **run, "key": study.key_of(run), "metrics": metrics, "curve": [{"tokens": 2000}], **more}


def test_a_table_compares_with_its_first_line(tmp_path):
    timed = {name: value for name, value in LINE.items() if name != "steps"} | {"minutes": 3.2}
    file = table(tmp_path, {**LINE, "name": "base"}, {**timed, "name": "other", "fields": {"ln_pos": 1}})
    runs = study.read_table(file)
    results = [pretrained(run, loss) for run, loss in zip(runs, [5.0, 6.0, 4.5, 5.7], strict=True)]
    titles, _, *rows = report.markdown(report.lines_of(file, results)).splitlines()
    assert "| difference to base |" in titles and "character" not in titles
    assert rows == [
        "| base | 2 of 2 | 10 | 2k | 5.500 ± 0.707 |  | 50.0% | 100.0% |",
        "| other | 2 of 2 | 10 in 3.2 CPU minutes | 2k | 5.100 ± 0.849 | -0.400 ± 0.141 | 50.0% | 100.0% |",
    ]
    some = report.markdown(report.lines_of(file, results[:3])).splitlines()[3:]
    assert some == [
        "| other | 1 of 2 | 10 in 3.2 CPU minutes | 2k | 4.500 | -0.500 (1 seed) | 50.0% | 100.0% |",
        "",
        "3 of 4 runs are made.",
    ]
    assert report.markdown(report.lines_of(file, [])) == "Not run yet."


def test_help_says_what_the_program_is_for_and_writes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(report, "read_results", None)
    with pytest.raises(SystemExit) as exited:
        report.main(["--help"])
    assert exited.value.code == 0 and "docs/experiments.md" in capsys.readouterr().out


def test_different_vocabularies_are_compared_by_character(tmp_path):
    file = table(tmp_path, {**LINE, "name": "base"}, {**LINE, "name": "larger", "vocabulary": 16000})
    results = [
        pretrained(run, loss, characters_per_token=characters)
        for run, loss, characters in zip(
            study.read_table(file), [5.0, 5.0, 6.0, 6.0], [2.0, 2.0, 3.0, 3.0], strict=True
        )
    ]
    titles, _, *rows = report.markdown(report.lines_of(file, results)).splitlines()
    assert "| characters per token | nats per character | difference to base |" in titles
    assert "| 5.000 ± 0.000 | 2.00 | 2.500 ± 0.000 |  |" in rows[0]
    assert "| 6.000 ± 0.000 | 3.00 | 2.000 ± 0.000 | -0.500 ± 0.000 |" in rows[1]


def results_of(file: Path, metrics: list[dict]) -> list[dict]:
    """Results of the first runs of a table of tasks, as they are kept."""
    runs = study.read_table(file)[: len(metrics)]
    return [
        {"steps": 1200, **run, "key": study.key_of(run), "metrics": of_run}
        for run, of_run in zip(runs, metrics, strict=True)
    ]


def test_a_table_of_readers_shows_what_they_are_judged_by(tmp_path, monkeypatch):
    kept_models(tmp_path, monkeypatch)
    file = table(tmp_path, TASK, {**TASK, "name": "other", "minutes": 2})
    results = results_of(file, [{"exact_match": 1, "f1": 20}, {"exact_match": 3, "f1": 20}])
    assert report.markdown(report.lines_of(file, results)).splitlines()[2:] == [
        "| reads | 2 of 2 | 1,200 in 1 CPU minutes | 2.0 ± 1.4 | 20.0 ± 0.0 |",
        "",
        "2 of 4 runs are made.",
    ]


def test_a_table_of_retrievers_begins_with_terms_alone(tmp_path, monkeypatch):
    """Also where some have seen no question; only where none has, all questions count."""
    kept_models(tmp_path, monkeypatch)
    names = {*report.RETRIEVAL_COLUMNS.values()}

    def metrics(prefix, lexical, dense, hybrid, p):
        values = {"lexical": lexical, "dense": dense, "hybrid": hybrid}
        found = {f"{prefix}{mode}/{name}": value for mode, value in values.items() for name in names}
        return {**found, f"{prefix}gain/accuracy@1": hybrid - lexical, f"{prefix}p/accuracy@1": p}

    as_it_is = {name: value for name, value in TASK.items() if name != "minutes"} | {"steps": 0, "task": "retrieval"}
    trained = {**as_it_is, "name": "finds", "steps": 5}
    file = table(tmp_path, {**as_it_is, "seeds": [1]}, trained)
    before = metrics("", 90, 20, 91, 0.5) | metrics("all questions/", 80, 10, 81, 0.4)
    after = [metrics("", 90, 50, 92, 0.01), metrics("", 90, 52, 94, 0.001)]
    rows = report.markdown(report.lines_of(file, results_of(file, [before, *after]))).splitlines()[2:]
    assert rows == [
        "| terms alone (BM25) |  |  " + "| 90.0 " * 7 + "|" + "  |" * 6,
        "| reads | 1 of 1 | 0 " + "| 20.0 " * 7 + "| 91.0 " * 4 + "| +1.0 | 0.5000 |",
        "| finds | 2 of 2 | 5 " + "| 51.0 ± 1.4 " * 7 + "| 93.0 ± 1.4 " * 4 + "| +3.0 ± 1.4 | 0.0100 |",
    ]
    file = table(tmp_path, {**as_it_is, "seeds": [1]})
    rows = report.markdown(report.lines_of(file, results_of(file, [before]))).splitlines()[2:]
    assert rows[1] == "| reads | 1 of 1 | 0 " + "| 10.0 " * 7 + "| 81.0 " * 4 + "| +1.0 | 0.4000 |"


def test_the_page_shows_the_kept_results():
    """docs/experiments.md is what report.py makes of results.jsonl."""
    page = report.PAGE.read_text("utf-8")
    assert report.rewrite(page, study.read_results(study.RESULTS)) == page
    assert "<!-- gains -->" in page
    named = re.findall(r"<!-- table: (\w+) -->", page)
    assert sorted(named) == sorted(file.stem for file in study.TABLES.glob("*.jsonl"))


def test_a_gain_is_over_the_seeds_that_both_lines_have(tmp_path, monkeypatch):
    monkeypatch.setattr(gains, "TABLES", tmp_path)
    file = table(tmp_path, {**LINE, "name": "base"}, {**LINE, "name": "other", "fields": {"ln_pos": 1}})
    runs = study.read_table(file)
    results = [pretrained(run, loss) for run, loss in zip(runs, [5.0, 6.0, 4.5, 5.8], strict=True)]
    comparison = gains.Comparison(file.stem, "base", "other")
    assert gains.gain_of(comparison, results) == "+0.35 ± 0.21"
    assert gains.gain_of(comparison, results[:3]) == "+0.50 (1 seed)"
    assert gains.gain_of(comparison, results[:2]) == "not made yet"


def test_every_choice_is_of_lines_that_are_there():
    """And trained as long as the title of its column says: what it is compared with as well."""
    steps = {"3 minutes": (430, 740), "a quarter of an hour": (1800, 3000), "an hour": (6500, 11000)}
    for tried in gains.CHOICES.values():
        for length, comparison in tried.items():
            runs = {run["name"]: run for run in study.read_table(study.TABLES / f"{comparison.table}.jsonl")}
            fewest, most = steps[length]
            for name in (comparison.without, comparison.chosen):
                assert fewest <= runs[name]["steps"] <= most


def curve_of(steps: int, first: int, distance: int) -> dict:
    """A result whose loss falls from 7 to 5 on a straight line, but for the end, which is judged otherwise."""
    curve = [
        {"step": step, "tokens": 50_000 * step, "mlm_loss": 7 - 2 * step / steps}
        for step in range(first, steps + 1, distance)
    ]
    return {"steps": steps, "curve": curve, "metrics": {"unigram_loss": 7.0, "mlm_loss": 4.8}}


@pytest.mark.parametrize("draw", [report.draw_finalists, report.draw_growth])
def test_seeds_are_averaged_at_like_places(tmp_path, monkeypatch, draw):
    """Curves of 4 and of 8 points, of runs whose budget became other numbers of steps, on one straight line."""
    drawn, ends = [], []
    plot, errorbar = Axes.plot, Axes.errorbar
    monkeypatch.setattr(Axes, "plot", lambda axis, *xy, **more: drawn.append(xy) or plot(axis, *xy, **more))
    monkeypatch.setattr(
        Axes, "errorbar", lambda axis, *xy, **more: ends.append((*xy, more["yerr"])) or errorbar(axis, *xy, **more)
    )
    results = {1: curve_of(40, 10, 10), 2: curve_of(80, 20, 5)}
    results[2]["metrics"]["mlm_loss"] = 5.0
    draw([report.Line("a", results, 2)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    lines = [xy for xy in drawn if len(xy) == 2]
    if draw is report.draw_finalists:
        minutes, by_minutes = lines.pop(0)
        assert (minutes[0], minutes[-1]) == (15, 45) and by_minutes == pytest.approx(7 - minutes / 30)
        assert ends.pop(0) == (60, 4.9, [[pytest.approx(0.1)], [pytest.approx(0.1)]])
    ((tokens, by_tokens),) = lines
    assert (tokens[0], tokens[-1]) == (1.0, 1.5)
    assert by_tokens == pytest.approx(7 - (tokens + tokens / 2) / 2)
    assert ends == [(3.0, 4.9, [[pytest.approx(0.1)], [pytest.approx(0.1)]])]


def test_a_seam_is_marked_where_a_run_was_taken_up(tmp_path, monkeypatch):
    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axis, *xy, **more: drawn.append(xy) or plot(axis, *xy, **more))
    taken_up = {**curve_of(40, 10, 10), "taken_up_at": [20, 30]}
    report.draw_growth([report.Line("a", {1: taken_up}, 1)], tmp_path / "curves.png")
    ((tokens, losses, _),) = [xy for xy in drawn if len(xy) == 3]
    assert tokens == pytest.approx([1.0, 1.5]) and losses == pytest.approx([6.0, 5.5])
