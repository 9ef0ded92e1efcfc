#!/usr/bin/env python
"""What a training step of each line of a table costs beside one of the first line, in CPU time.

    python benchmarks/learning/step_costs.py benchmarks/learning/tables/kernels.jsonl --corpus_path CORPUS

The lines take turns, and the least of some rounds counts: other programs make CPU time longer, but for all lines
alike. Lines with a task or stages are left out. With it a table at equal CPU time gives each line its `steps`, which
no run has to time for itself.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from metering import time_steps
from study import BUDGETS, key_of, prepare_tokenizer, read_table
from train_one import train_first_steps

from mixlm.errors import UserError, exits_on_user_error
from mixlm.progress import progress_bar
from mixlm.tokenization import load_tokenizer


@exits_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a step of each line costs beside the first line's.")
    parser.add_argument("tables", nargs="+", type=Path, help="as for study.py")
    parser.add_argument("--corpus_path", required=True, help="as for study.py")
    parser.add_argument("--work_dir", type=Path, default=Path(".cache/learning"), help="for tokenizers and the store")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    work = arguments.work_dir.resolve()
    os.environ["MIXLM_CACHE"] = str(work / "cache")
    lines = {}
    for run in (run for table in arguments.tables for run in read_table(table)):
        # A task has other steps, and one of several stages has steps of several costs.
        if not run["task"] and not run["stages"]:
            line = {name: value for name, value in run.items() if name not in BUDGETS} | {"seed": 1}
            lines.setdefault(key_of(line), line)
    if not lines:
        raise UserError(f"{', '.join(map(str, arguments.tables))}: no line of pretraining without stages")
    seconds: dict[str, list[float]] = {key: [] for key in lines}
    with progress_bar(total=arguments.rounds * len(lines), unit="line", desc="timing", delay=0) as progress:
        for _ in range(arguments.rounds):
            for key, line in lines.items():
                tokenizer = prepare_tokenizer(arguments.corpus_path, line["vocabulary"], work)
                told = {**line, "corpus": arguments.corpus_path, "tokenizer": str(tokenizer)}
                with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
                    train = partial(train_first_steps, told, Path(folder), load_tokenizer(str(tokenizer)))
                    seconds[key].append(time_steps(train)[0])
                progress.update()
    first = min(seconds[next(iter(lines))])
    for key, line in lines.items():
        print(f"{min(seconds[key]) / first:6.3f}  {line['name']}")


if __name__ == "__main__":
    main()
