#!/usr/bin/env python
"""Tables and figures of docs/experiments.md, from the kept results alone.

    python benchmarks/learning/report.py

What stands in the page between `<!-- table: NAME -->` and `<!-- end -->` becomes the table of tables/NAME.jsonl, and
what stands between `<!-- gains -->` and `<!-- end -->` that of gains.py. docs/learning.png becomes the curves of
tables/finalists.jsonl, docs/growth.png those of tables/growth.jsonl, and docs/scaling.png what is fitted to
tables/scaling.jsonl.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from gains import rows_of_gains
from lines import Line, beginning_of_row, difference, lines_of, loss_of, spread
from scaling import draw_scaling, rows_of_laws, rows_of_runs, save
from study import FOLDER, RESULTS, TABLES, read_results

matplotlib.use("Agg")  # no screen
from matplotlib import pyplot
from matplotlib.axes import Axes

sys.path.insert(0, str(FOLDER.parent))
from pages import grid, replaced

from mixlm.errors import exits_on_user_error
from mixlm.files import write_whole

DOCUMENTS = FOLDER.parents[1] / "docs"
PAGE = DOCUMENTS / "experiments.md"
SCALING_TABLE, FINALIST_MINUTES = "scaling", 60
PLACES = 200  # of a drawn curve
ORDINATE = "held-out loss (nats per masked token)"
READING_COLUMNS = {"EM": "exact_match", "F1": "f1"}
RETRIEVAL_COLUMNS = {
    "accuracy@1": "accuracy@1",
    "@5": "accuracy@5",
    "@10": "accuracy@10",
    "MRR@10": "mrr@10",
    "by answer: @1": "answer_accuracy@1",
    "answer @5": "answer_accuracy@5",
    "answer @10": "answer_accuracy@10",
}
# With the sign that the numbers have.
HYBRID_COLUMNS = {
    "hybrid accuracy@1": ("hybrid/accuracy@1", ""),
    "hybrid @10": ("hybrid/accuracy@10", ""),
    "hybrid MRR@10": ("hybrid/mrr@10", ""),
    "hybrid answer @1": ("hybrid/answer_accuracy@1", ""),
    "gain @1": ("gain/accuracy@1", "+"),
}
GREATEST_P = "p, at most"
_TABLE = re.compile(r"<!-- (table: (\w+)) -->")


def markdown(lines: Sequence[Line], rows_of: Callable[[Sequence[Line]], list[dict[str, Any]]] | None = None) -> str:
    """A table of the lines that have results, and how many of its runs are made; by task unless `rows_of` is given."""
    made, planned = sum(len(line.results) for line in lines), sum(line.seeds for line in lines)
    if not made:
        return "Not run yet."
    task = next(result["task"] for line in lines for result in line.results.values())
    rows = (rows_of or ROWS[task])([line for line in lines if line.results])
    missing = f"\n\n{made} of {planned} runs are made." if made < planned else ""
    return f"{grid(rows)}{missing}"


def rows_of_pretraining(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Cells by the title of their column; each line is compared with the first, seed by seed.

    The difference of a line is the mean over the seeds that both have; what follows ± is the standard deviation. Where
    vocabularies differ, losses per token say nothing, and those per character are compared.
    """
    base = lines[0]
    vocabularies = {result["vocabulary"] for line in lines for result in line.results.values()}
    compared = loss_of if len(vocabularies) == 1 else loss_per_character
    rows = []
    for line in lines:
        results = list(line.results.values())
        second = [result["metrics"].get("sop_accuracy", result["metrics"].get("ict_recall@1")) for result in results]
        tokens = statistics.mean(result["curve"][-1]["tokens"] for result in results)
        row = {**beginning_of_row(line), "tokens seen": f"{tokens / 1000:,.0f}k"}
        row["held-out loss (nats)"] = spread(map(loss_of, results))
        if compared is loss_per_character:
            row["characters per token"] = f"{results[0]['characters_per_token']:.2f}"
            row["nats per character"] = spread(map(loss_per_character, results))
        row[f"difference to {base.name}"] = "" if line is base else difference(line, base, compared)
        row["accuracy"] = f"{100 * statistics.mean(result['metrics']['mlm_accuracy'] for result in results):.1f}%"
        row["second objective"] = f"{100 * statistics.mean(second):.1f}%"
        rows.append(row)
    return rows


def rows_of_reading(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Cells by the title of their column: what readers are judged by, in percent."""
    return [
        {**beginning_of_row(line), **{title: metric_of(line, name) for title, name in READING_COLUMNS.items()}}
        for line in lines
    ]


def rows_of_retrieval(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Cells by the title of their column: what retrievers are judged by, in percent, below a row of terms alone.

    Encoders of which none has seen a question are judged by all questions.
    """
    have_seen_none = all(result["steps"] == 0 for line in lines for result in line.results.values())
    of_all = "all questions/" if have_seen_none else ""
    # Terms have no seeds: what they find is the same in all runs.
    terms = lines[0]._replace(results=dict([next(iter(lines[0].results.items()))]))
    row = dict.fromkeys(beginning_of_row(terms), "") | {"": "terms alone (BM25)"}
    row |= {title: metric_of(terms, f"{of_all}lexical/{name}") for title, name in RETRIEVAL_COLUMNS.items()}
    rows = [row | dict.fromkeys([*HYBRID_COLUMNS, GREATEST_P], "")]
    for line in lines:
        row = beginning_of_row(line)
        row |= {title: metric_of(line, f"{of_all}dense/{name}") for title, name in RETRIEVAL_COLUMNS.items()}
        row |= {title: metric_of(line, of_all + name, sign) for title, (name, sign) in HYBRID_COLUMNS.items()}
        row[GREATEST_P] = f"{max(result['metrics'][f'{of_all}p/accuracy@1'] for result in line.results.values()):.4f}"
        rows.append(row)
    return rows


def metric_of(line: Line, name: str, sign: str = "") -> str:
    """A metric over the seeds of a line."""
    return spread((result["metrics"][name] for result in line.results.values()), sign, digits=1)


def loss_per_character(result: dict[str, Any]) -> float:
    """The same in nats per character, as tokens are long on average."""
    return loss_of(result) / result["characters_per_token"]


ROWS = {None: rows_of_pretraining, "reading": rows_of_reading, "retrieval": rows_of_retrieval}


def rewrite(page: str, results: Sequence[dict[str, Any]]) -> str:
    """The page with its tables made anew."""
    for place, name in _TABLE.findall(page):
        lines = lines_of(TABLES / f"{name}.jsonl", results)
        block = markdown(lines)
        if name == SCALING_TABLE and any(line.results for line in lines):
            block = f"{markdown(lines, rows_of_runs)}\n\n{grid(rows_of_laws(lines))}"
        page = replaced(page, place, block)
    return replaced(page, "gains", grid(rows_of_gains(results)))


def minutes_of(result: dict[str, Any]) -> list[float]:
    """Minutes of the hour at each point of the curve of a finalist: the share of its steps, and no clock.

    The clock of the run itself also has what other programs cost it.
    """
    return [FINALIST_MINUTES * point["step"] / result["steps"] for point in result["curve"]]


def tokens_of(result: dict[str, Any]) -> list[float]:
    """Millions of tokens seen at each point of the curve."""
    return [point["tokens"] / 1e6 for point in result["curve"]]


def draw_line(axis: Axes, line: Line, abscissa: Callable[[dict[str, Any]], list[float]]) -> str:
    """A line's held-out loss, the mean of the seeds between the least and the greatest; returns its colour.

    Seeds have their points at places of their own: they are compared where all of them have been, between points. The
    end is a dot: it is judged on more blocks than the points on the way, and lies apart from them.
    """
    results = list(line.results.values())
    own_places = [abscissa(result)[:-1] for result in results]
    places = np.linspace(max(own[0] for own in own_places), min(own[-1] for own in own_places), PLACES)
    losses = np.array(
        [
            np.interp(places, own, [point["mlm_loss"] for point in result["curve"][:-1]])
            for own, result in zip(own_places, results, strict=True)
        ]
    )
    (drawn,) = axis.plot(places, losses.mean(axis=0), label=line.name, linewidth=1.6)
    colour = drawn.get_color()
    axis.fill_between(places, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.2)
    ends = [loss_of(result) for result in results]
    end, mean = statistics.mean(abscissa(result)[-1] for result in results), statistics.mean(ends)
    axis.errorbar(end, mean, yerr=[[mean - min(ends)], [max(ends) - mean]], fmt="o", markersize=4, color=colour)
    return colour


def draw_unigram(axis: Axes, lines: Sequence[Line]) -> None:
    """The loss of a model that knows token frequencies alone."""
    first = next(iter(lines[0].results.values()))
    level = first["metrics"]["unigram_loss"]
    axis.axhline(level, color="grey", linestyle=":", linewidth=1, label="token frequencies alone")


def draw_finalists(lines: Sequence[Line], file: Path) -> None:
    """Held-out loss against the share of an hour and against tokens."""
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5), sharey=True)
    abscissas = {"minutes of the hour, by steps": minutes_of, "million tokens": tokens_of}
    for axis, (label, abscissa) in zip(axes, abscissas.items(), strict=True):
        for line in lines:
            draw_line(axis, line, abscissa)
        draw_unigram(axis, lines)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(ORDINATE)
    axes[0].legend()
    save(figure, file)


def draw_growth(lines: Sequence[Line], file: Path) -> None:
    """Held-out loss against tokens, which are drawn by their logarithm; a bar where a run was taken up again."""
    figure, axis = pyplot.subplots(figsize=(9, 5))
    for line in lines:
        colour = draw_line(axis, line, tokens_of)
        for result in line.results.values():
            steps, losses = ([point[name] for point in result["curve"]] for name in ("step", "mlm_loss"))
            seams = result.get("taken_up_at", [])
            places = np.interp(seams, steps, tokens_of(result))
            axis.plot(places, np.interp(seams, steps, losses), "|", color=colour, markersize=16, markeredgewidth=1.5)
    draw_unigram(axis, lines)
    axis.set(xscale="log", xlabel="million tokens", ylabel=ORDINATE)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    save(figure, file)


# What is drawn of which table, and where.
FIGURES = {
    "finalists": (draw_finalists, DOCUMENTS / "learning.png"),
    SCALING_TABLE: (draw_scaling, DOCUMENTS / "scaling.png"),
    "growth": (draw_growth, DOCUMENTS / "growth.png"),
}


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    results = read_results(RESULTS)
    write_whole(PAGE, rewrite(PAGE.read_text("utf-8"), results))
    for table, (draw, figure) in FIGURES.items():
        if lines := [line for line in lines_of(TABLES / f"{table}.jsonl", results) if line.results]:
            draw(lines, figure)


if __name__ == "__main__":
    main()
