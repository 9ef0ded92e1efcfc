"""`mixlm report` and `verify-engines`: what trainings did."""

import argparse
import sys
from pathlib import Path

from ..errors import UserError
from .tables import significant, table


def add_report_parser(subparsers) -> None:
    """Add `mixlm report`."""
    parser = subparsers.add_parser(
        "report",
        help="draw the curves of one or several training runs",
        description="Draw the curves of training runs into a PNG and print their last numbers.",
        epilog="example:\n  mixlm report outputs/my-model",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="output_dir/model_name of a run")
    parser.add_argument(
        "--out", type=Path, metavar="PNG", help="the picture (default: curves.png in the first run's folder)"
    )
    parser.set_defaults(run=report_runs_verb)


def add_verify_engines_parser(subparsers) -> None:
    """Add `mixlm verify-engines`."""
    parser = subparsers.add_parser(
        "verify-engines",
        help="show whether every sharding engine trains rightly on this machine",
        description=(
            "Train a small model with every engine (--zero, --sharding_backend, --auto_wrap) and precision on several "
            "processes, and compare with one process: losses, gradient norms, parameters and AdamW's moments after "
            "the last step, largest relative differences. Each engine trains twice and must give the same bits. The "
            "exit code is 1 if an engine is wrong."
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
    parser.set_defaults(run=verify_engines_verb)


def report_runs_verb(arguments: argparse.Namespace) -> None:
    """`mixlm report`."""
    from ..training.report import last_values, plot_curves, read_curves

    names = [folder.resolve().name for folder in arguments.runs]
    labels = names if len(set(names)) == len(names) else map(str, arguments.runs)
    runs = {label: read_curves(folder) for label, folder in zip(labels, arguments.runs, strict=True)}
    out = arguments.out or arguments.runs[0] / "curves.png"
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: name a file that ends in .png")
    plot_curves(runs, out)
    for name, curves in runs.items():
        print(name)
        print(table([(tag, significant(value), f"step {step:,}") for tag, step, value in last_values(curves)]))
    print(f"curves: {out}")


def verify_engines_verb(arguments: argparse.Namespace) -> None:
    """`mixlm verify-engines`."""
    if not 2 <= arguments.processes <= 8:
        raise UserError(f"--processes {arguments.processes}: must be from 2 to 8")
    import torch

    from ..training.verification import available_cases, verify_engines

    gpus = torch.cuda.device_count()
    if 0 < gpus < arguments.processes:
        raise UserError(f"--processes {arguments.processes}: each needs a GPU of its own, and there are {gpus} here")
    cases = available_cases()
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
