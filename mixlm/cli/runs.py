"""`mixlm report` and `verify-engines`: what trainings did."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .tables import significant, table

if TYPE_CHECKING:
    from ..evaluation.reading_report import JudgedQuestion


def add_report_parser(subparsers) -> None:
    """Add `mixlm report`."""
    parser = subparsers.add_parser(
        "report",
        help="draw the curves of one or several runs, and where readers lose EM and F1",
        description=(
            "Draw the curves of training runs into a PNG and print their last numbers. Of a run of run_mrc.py also "
            "print where EM and F1 are lost, and draw it into reading.png in the run's folder."
        ),
        epilog="example:\n  mixlm report outputs/my-model",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIR", help="output_dir/model_name of a run, or of one with --seeds"
    )
    parser.add_argument("--out", type=Path, metavar="PNG", help="the curves (default: curves.png in the first folder)")
    parser.set_defaults(run=report_runs_verb)


def add_verify_engines_parser(subparsers) -> None:
    """Add `mixlm verify-engines`."""
    parser = subparsers.add_parser(
        "verify-engines",
        help="show whether every sharding engine trains rightly on this machine",
        description=(
            "Train a small model with every engine (--zero, --sharding_backend, --auto_wrap) and precision on several "
            "processes, and compare with one process: losses, gradient norms, parameters and the optimizer's moments "
            "after the last step, largest relative differences. Each engine trains twice and must give the same bits. "
            "The exit code is 1 if an engine is wrong."
        ),
        epilog="example:\n  mixlm verify-engines --processes 2",
    )
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="of an engine (default: %(default)s)")
    parser.add_argument("--family", choices=("mixlm", "switch"), default="mixlm", help="default: %(default)s")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("fp32", "bf16", "fp16"),
        default=["fp32", "bf16", "fp16"],
        help="default: all three",
    )
    parser.add_argument("--muon", action="store_true", help="with Muon, and the engines that can use it")
    parser.set_defaults(run=verify_engines_verb)


def report_runs_verb(arguments: argparse.Namespace) -> None:
    """`mixlm report`."""
    from ..evaluation.reading_report import QUESTIONS_FILE, load_judged
    from ..training.card import CURVES_FILE, READING_FILE
    from ..training.report import last_values, plot_curves, plot_reading, read_curves

    out = arguments.out or arguments.runs[0] / CURVES_FILE
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: name a file that ends in .png")
    folders = [folder for given in arguments.runs for folder in _runs_of(given)]
    names = [folder.resolve().name for folder in folders]
    runs = dict(zip(names if len(set(names)) == len(names) else map(str, folders), folders, strict=True))
    curves = {name: found for name, folder in runs.items() if (found := read_curves(folder))}
    judged = {name: load_judged(file) for name, folder in runs.items() if (file := folder / QUESTIONS_FILE).exists()}
    for name, folder in runs.items():
        if name not in curves and name not in judged:
            raise UserError(
                f"{folder}: no curves and no {QUESTIONS_FILE} there; give a run's folder (output_dir/model_name)"
            )
    if curves:
        plot_curves(curves, out)
    for name, folder in runs.items():
        print(name)
        if name in curves:
            print(table([(tag, significant(last), f"step {step:,}") for tag, step, last in last_values(curves[name])]))
        if name in judged:
            plot_reading(name, judged[name], folder / READING_FILE)
            print("\n" + "\n\n".join(map(table, _reading_tables(judged[name]))))
            print(f"reading: {folder / READING_FILE}")
    if curves:
        print(f"curves: {out}")


def _runs_of(folder: Path) -> list[Path]:
    """The folder itself, or those of its seeds, in their order, where it holds no run but them."""
    from ..training.record import RESULTS_FILE
    from ..training.run import CHECKPOINTS

    seeds = [path for path in folder.glob("seed-*") if path.is_dir()]
    if not seeds or (folder / CHECKPOINTS).exists() or (folder / RESULTS_FILE).exists():
        return [folder]
    return sorted(seeds, key=lambda path: (len(path.name), path.name))


def _reading_tables(questions: "Sequence[JudgedQuestion]") -> list[list[tuple[str, ...]]]:
    """Rows about all questions, about each part of them that tells something, and about the kinds of errors."""
    from ..evaluation.reading_report import ERRORS, scores_by_part, scores_of, telling_aspects

    whole = scores_of(questions)
    tables = [
        [
            ("questions", f"{whole.questions:,}", ""),
            ("EM", f"{whole.exact_match:.1f}", "%"),
            ("F1", f"{whole.f1:.1f}", "%"),
            ("EM ceiling", f"{whole.expressible:.1f}", "% of the questions have a span of tokens as answer"),
        ]
    ]
    for aspect, parts in telling_aspects(questions):
        rows = [
            (name, f"{part.questions:,}", f"{part.exact_match:.1f}", f"{part.f1:.1f}", aspect.parts[name])
            for name, part in parts.items()
        ]
        tables.append([(aspect.title, "questions", "EM", "F1", ""), *rows])
    kinds = scores_by_part(questions, ERRORS)
    wrong = sum(part.questions for kind, part in kinds.items() if kind != "correct")
    rows = [
        (
            kind,
            f"{part.questions:,}",
            f"{part.questions / whole.questions:.1%}",
            "" if kind == "correct" else f"{part.questions / wrong:.1%}",
            f"{part.f1:.1f}",
            ERRORS.parts[kind],
        )
        for kind, part in kinds.items()
    ]
    return [*tables, [("error", "questions", "of all", "of errors", "F1", ""), *rows]]


def verify_engines_verb(arguments: argparse.Namespace) -> None:
    """`mixlm verify-engines`."""
    if not 2 <= arguments.processes <= 8:
        raise UserError(f"--processes {arguments.processes}: must be from 2 to 8")
    import torch

    from ..training.verification import available_cases, verify_engines

    gpus = torch.cuda.device_count()
    if 0 < gpus < arguments.processes:
        raise UserError(f"--processes {arguments.processes}: each needs a GPU of its own, and there are {gpus} here")
    cases = available_cases(arguments.muon)
    device = "GPUs" if gpus else "the CPU"
    print(f"{len(cases)} engines, {arguments.processes} processes each, on {device}: a minute or less for each")
    print(
        f"{'engine':<28}{'precision':<11}{'loss':>8}{'norm':>9}{'weights':>9}{'moments':>9}"
        f"  {'repeats':<9}{'MiB/rank':>8}{'samples/s':>11}  verdict"
    )

    def report(now: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K... {now}", end="", file=sys.stderr, flush=True)

    verdicts = []
    for verdict in verify_engines(cases, arguments.processes, arguments.family, arguments.precision, report):
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        verdicts.append(verdict)
        row = f"{verdict.case.name:<28}{verdict.precision:<11}"
        if verdict.differences is None:
            print(f"{row}FAILED: {verdict.failure}", flush=True)
            continue
        differences = "".join(f"{value:>9.0e}" for value in verdict.differences)[1:]
        print(
            f"{row}{differences}  {'yes' if verdict.is_repeatable else 'NO':<9}{verdict.peak_bytes / 2**20:>8.0f}"
            f"{verdict.samples_per_second:>11.0f}  {'right' if verdict.is_right else 'WRONG'}",
            flush=True,
        )
    wrong = [verdict for verdict in verdicts if not verdict.is_right]
    print(f"{len(verdicts) - len(wrong)} of {len(verdicts)} are right")
    if wrong:
        sys.exit(1)
