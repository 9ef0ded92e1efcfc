#!/usr/bin/env python
"""Tables and figures of docs/experiments.md, from the kept results alone.

    python benchmarks/learning/report.py

What stands in the page between `<!-- table: NAME -->` and `<!-- end -->` becomes the table of tables/NAME.jsonl, and
docs/learning.png the curves of tables/finalists.jsonl.
"""

import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from study import FOLDER, RESULTS, key_of, read_results, read_table

matplotlib.use("Agg")  # no screen
from matplotlib import pyplot

DOCUMENTS = FOLDER.parents[1] / "docs"
PAGE = DOCUMENTS / "experiments.md"
FIGURE = DOCUMENTS / "learning.png"
FIGURE_TABLE = "finalists"
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


class Line(NamedTuple):
    """A line of a table, and what came of it.

    Args:
        name: as the table has it.
        results: those that are there, by seed.
        seeds: how many the table asks for.
    """

    name: str
    results: dict[int, dict[str, Any]]
    seeds: int


def lines_of(table: Path, results: Iterable[dict[str, Any]]) -> list[Line]:
    """The lines of a table in its order."""
    by_key = {result["key"]: result for result in results}
    lines: dict[str, Line] = {}
    for run in read_table(table):
        line = lines.setdefault(run["name"], Line(run["name"], {}, 0))
        if key_of(run) in by_key:
            line.results[run["seed"]] = by_key[key_of(run)]
        lines[run["name"]] = line._replace(seeds=line.seeds + 1)
    return list(lines.values())


def markdown(lines: Sequence[Line]) -> str:
    """A table in which each line that has results is compared with the first, seed by seed.

    The difference of a line is the mean over the seeds that both have; what follows ± is the standard deviation.
    """
    base = lines[0].results
    made = sum(len(line.results) for line in lines)
    if not made:
        return "Not run yet.\n"
    if any(result.get("task") for line in lines for result in line.results.values()):
        return task_markdown(lines)
    rows = ["| | seeds | tokens seen | held-out loss (nats) | difference | accuracy | second objective |"]
    rows.append("|---|---|---|---|---|---|---|")
    for number, line in enumerate(lines):
        results = list(line.results.values())
        if not results:
            continue
        common = [seed for seed in line.results if seed in base and number]
        differences = [loss_of(line.results[seed]) - loss_of(base[seed]) for seed in common]
        second = [result["metrics"].get("sop_accuracy", result["metrics"].get("ict_recall@1")) for result in results]
        tokens = statistics.mean(result["curve"][-1]["tokens"] for result in results)
        cells = [
            line.name,
            len(results),
            f"{tokens / 1000:,.0f}k",
            spread(map(loss_of, results)),
            spread(differences, sign="+"),
            f"{100 * statistics.mean(result['metrics']['mlm_accuracy'] for result in results):.1f}%",
            f"{100 * statistics.mean(second):.1f}%",
        ]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    planned = sum(line.seeds for line in lines)
    if made < planned:
        rows.append(f"\n{made} of {planned} runs are made.")
    return "\n".join(rows) + "\n"


def task_markdown(lines: Sequence[Line]) -> str:
    """A table of fine-tunings: what each task is judged by, in percent."""
    rows = ["| | seeds | steps | EM | F1 | accuracy@1 | MRR@10 |", "|---|---|---|---|---|---|---|"]
    for line in lines:
        results = list(line.results.values())
        if results:
            steps = f"{statistics.mean(result['steps'] for result in results):,.0f}"
            cells = [
                spread((result["metrics"][name] for result in results if name in result["metrics"]), digits=1)
                for name in ("exact_match", "f1", "accuracy@1", "mrr@10")
            ]
            rows.append(f"| {' | '.join([line.name, str(len(results)), steps, *cells])} |")
    return "\n".join(rows) + "\n"


def loss_of(result: dict[str, Any]) -> float:
    """The held-out loss at the end, in nats per masked token."""
    return result["metrics"]["mlm_loss"]


def spread(values: Iterable[float], sign: str = "", digits: int = 3) -> str:
    """Mean ± standard deviation; of one value that value, of none nothing."""
    values = list(values)
    if not values:
        return ""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def rewrite(page: str, results: Sequence[dict[str, Any]]) -> str:
    """The page with its tables made anew."""

    def table(match: re.Match) -> str:
        begin, name, end = match.groups()
        return f"{begin}\n{markdown(lines_of(FOLDER / 'tables' / f'{name}.jsonl', results))}\n{end}"

    return _TABLE.sub(table, page)


def minutes_of(result: dict[str, Any]) -> list[float]:
    """CPU minutes at each point of the curve of a run whose budget was minutes.

    Its steps were timed before it began; the clock of the run itself also has what other programs cost it.
    """
    return [result["minutes"] * point["step"] / result["steps"] for point in result["curve"]]


def tokens_of(result: dict[str, Any]) -> list[float]:
    """Millions of tokens seen at each point of the curve."""
    return [point["tokens"] / 1e6 for point in result["curve"]]


def draw_curves(lines: Sequence[Line], file: Path) -> None:
    """Held-out loss against CPU time and against tokens: the mean of the seeds, between the least and the greatest."""
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5), sharey=True)
    for axis, label, abscissa in zip(axes, ("CPU minutes", "million tokens"), (minutes_of, tokens_of), strict=True):
        for line in filter(lambda line: line.results, lines):
            results = list(line.results.values())
            losses = np.array([[point["mlm_loss"] for point in result["curve"]] for result in results])
            places = np.mean([abscissa(result) for result in results], axis=0)
            (drawn,) = axis.plot(places, losses.mean(axis=0), label=line.name, linewidth=1.6)
            axis.fill_between(places, losses.min(axis=0), losses.max(axis=0), color=drawn.get_color(), alpha=0.2)
        unigram = next(line.results for line in lines if line.results)
        level = next(iter(unigram.values()))["metrics"]["unigram_loss"]
        axis.axhline(level, color="grey", linestyle=":", linewidth=1, label="unigram")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out loss (nats per masked token)")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main() -> None:
    results = read_results(RESULTS)
    PAGE.write_text(rewrite(PAGE.read_text("utf-8"), results), "utf-8")
    finalists = lines_of(FOLDER / "tables" / f"{FIGURE_TABLE}.jsonl", results)
    if any(line.results for line in finalists):
        draw_curves(finalists, FIGURE)


if __name__ == "__main__":
    main()
