"""Lines of a study's tables with what came of them, and the cells that every table shows of them."""

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from study import key_of, read_table


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


def beginning_of_row(line: Line) -> dict[str, Any]:
    """The cells that all tables have."""
    results = list(line.results.values())
    minutes = f" in {results[0]['minutes']} CPU minutes" if "minutes" in results[0] else ""
    return {
        "": line.name,
        "seeds": f"{len(results)} of {line.seeds}",
        "steps": f"{statistics.mean(result['steps'] for result in results):,.0f}{minutes}",
    }


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


def difference(line: Line, base: Line, measure: Callable[[dict[str, Any]], float] = loss_of, digits: int = 3) -> str:
    """By how much a line is above another, over the seeds that both have; nothing where they have none.

    Args:
        line, base: what is compared, and with what.
        measure: what is compared of a result.
        digits: behind the point.
    """
    common = sorted(line.results.keys() & base.results.keys())
    differences = [measure(line.results[seed]) - measure(base.results[seed]) for seed in common]
    return spread(differences, sign="+", digits=digits) + (" (1 seed)" if len(common) == 1 else "")
