#!/usr/bin/env python
"""Measure speed and memory, row by row, and keep the results.

    python benchmarks/run.py                          all rows; results.json and the table in README.md are kept up
    python benchmarks/run.py --only NAME [NAME ...]   these rows alone; nothing is written
    python benchmarks/run.py --only NAME --update     these rows alone, and they are kept
    python benchmarks/run.py --list                   the names

Close other programs first. What the numbers mean is in benchmarks/README.md.
"""

import argparse
import difflib
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; the processes that rows start inherit it
os.environ.setdefault("HF_HUB_OFFLINE", "1")

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]  # the rows' modules, and run_pretraining.py

import data_rows
import engine_rows
import model_rows
import pages
import torch
from measure import Result, Row

from mixlm.errors import USER_ERROR_EXIT_CODE, UserError, exits_on_user_error, one_line
from mixlm.files import json_text, write_whole

REGISTRY: list[Row] = [*model_rows.ROWS, *engine_rows.ROWS, *data_rows.ROWS]
RESULTS, README = FOLDER / "results.json", FOLDER / "README.md"
PLACE = "results"  # of the table in README.md
FAILURE_EXIT_CODE = 1


def row_names(registry: Sequence[Row]) -> list[str]:
    """The names of all rows, in the order of the table."""
    return [name for row in registry for name in row.names]


def require_known(names: Sequence[str], registry: Sequence[Row]) -> None:
    """Raise UserError for a name that no row has."""
    known = row_names(registry)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise UserError(f"no row {name!r}; " + (f"did you mean {close[0]}?" if close else "--list shows them"))


def read_results(path: Path) -> dict[str, Result]:
    """The kept results by name; none where there is no file yet.

    Raises:
        UserError: the file is not a list of results.
    """
    if not path.exists():
        return {}
    try:
        return {entry["name"]: Result(**entry) for entry in json.loads(path.read_text("utf-8"))}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a list of results ({one_line(error)}); delete it and measure again") from error


def keep(results: dict[str, Result], registry: Sequence[Row], folder: Path = FOLDER) -> None:
    """Write results.json and the table in README.md, in the registry's order; rows it no longer has come last."""
    order = row_names(registry)
    ordered = sorted(
        results.values(), key=lambda result: order.index(result.name) if result.name in order else len(order)
    )
    entries = [asdict(result) for result in ordered]
    write_whole(folder / RESULTS.name, json_text(entries))
    pages.replace(folder / README.name, PLACE, table(ordered, registry))


def table(results: Sequence[Result], registry: Sequence[Row]) -> str:
    """The results as a Markdown table."""
    descriptions = {name: row.description(name) for row in registry for name in row.names}
    rows = [
        {
            "row": f"`{result.name}`",
            "what": descriptions.get(result.name, ""),
            "value": f"**{number(result.value)}**",
            "unit": result.unit,
            "target": result.target,
            "met": {None: "", True: "yes", False: "no"}[result.is_met()],
            "shape": result.shape,
            "threads": result.threads,
            "pairs": result.pairs,
        }
        for result in results
    ]
    return pages.grid(rows, numbers={"value", "threads", "pairs"})


def number(value: float) -> str:
    """A value as a reader wants it: three digits, and all of a large number's."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def measure(row: Row) -> list[Result]:
    """Run a row and say what it found."""
    print(f"{', '.join(row.names)} ...", flush=True)
    started = time.perf_counter()
    results = list(row.run())
    found = [result.name for result in results]
    if sorted(found) != sorted(row.names):
        raise ValueError(f"the row of {', '.join(row.names)} gave {', '.join(found) or 'nothing'}")
    results.sort(key=lambda result: row.names.index(result.name))
    for result in results:
        verdict = {None: "", True: f", target {result.target}: met", False: f", target {result.target}: NOT met"}
        print(
            f"  {result.name}: {number(result.value)} {result.unit}{verdict[result.is_met()]}  ({result.shape})",
            flush=True,
        )
    print(f"  {time.perf_counter() - started:.0f} s", flush=True)
    return results


def run_rows(names: Sequence[str] | None, registry: Sequence[Row], write: bool, folder: Path = FOLDER) -> int:
    """Measure rows one after the other.

    A row that fails is reported, the others go on, and what was kept of it before stays.

    Args:
        names: of the rows; None = all, and rows that the registry no longer has are dropped at the end.
        registry: all rows.
        write: keep each result as soon as it is there, so that a killed run loses nothing.
        folder: of results.json and README.md.

    Returns:
        The exit code: 0, 2 where a row lacks what the user can give it, 1 where one failed otherwise.
    """
    results = read_results(folder / RESULTS.name) if write else {}
    exit_code = 0
    for row in registry:
        if names is not None and not set(names) & set(row.names):
            continue
        try:
            found = measure(row)
        except UserError as error:
            print(f"error: {', '.join(row.names)}: {one_line(error)}", file=sys.stderr, flush=True)
            exit_code = exit_code or USER_ERROR_EXIT_CODE
            continue
        except Exception:  # whatever a row meets, the others are still to be measured
            traceback.print_exc()
            print(f"error: {', '.join(row.names)}: failed, see above", file=sys.stderr, flush=True)
            exit_code = FAILURE_EXIT_CODE
            continue
        if write:
            results |= {result.name: result for result in found}
            keep(results, registry, folder)
    if write and names is None:
        keep({name: result for name, result in results.items() if name in row_names(registry)}, registry, folder)
    return exit_code


@exits_on_user_error
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="measure these rows alone")
    parser.add_argument("--update", action="store_true", help="with --only: keep their results")
    parser.add_argument("--list", action="store_true", help="show the names of all rows and what they are")
    arguments = parser.parse_args(argv)
    if arguments.update and arguments.only is None:
        raise UserError("--update is for --only; without --only all results are kept anyway")
    if arguments.list:
        for row in REGISTRY:
            for name in row.names:
                print(f"{name:<36} {row.description(name)}")
        return 0
    require_known(arguments.only or [], REGISTRY)
    torch.set_num_threads(1)
    return run_rows(arguments.only, REGISTRY, write=arguments.only is None or arguments.update)


if __name__ == "__main__":
    sys.exit(main())
