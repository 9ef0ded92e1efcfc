#!/usr/bin/env python
"""Make the runs of a table, several at once, and keep what came of them.

    python benchmarks/learning/study.py tables/masking.jsonl --corpus_path CORPUS

A line of a table is a run for each of its seeds:

    {"name": "masking 30%", "model": "mixlm", "fields": {}, "arguments": {"mlm_probability": 0.3}, "minutes": 4,
     "seeds": [1, 2, 3]}

`model` is a name in models.py, `fields` are of its configuration, `arguments` of run_pretraining.py, and the budget
is `minutes` of CPU time, `tokens`, or `steps`. A line can also have `candidates`, names in candidates.py; `stages`,
such as [{"from": 0.5, "max_seq_length": 128}], which change arguments at a share of the steps; `held_out`, arguments
of the text it is judged on; `vocabulary`, the size of the tokenizer; and `keep_model`, to leave the model in the work
folder's models/KEY. Every run has one thread. Results are lines of results.jsonl; what is there already is not made
again, and a run that was killed goes on from its last checkpoint (with a task: begins anew).

A line with a `task` ("reading" or "retrieval", see fine_tune_one.py) fine-tunes a model that another line has kept:
`"of": {"table": "pretrained", "name": "MixLM, SOP"}` is that line, for the same seed or the one that is given there as
`seed`. It is made after that line, and again when that line has changed. A budget of 0 steps evaluates the model as it
is.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mixlm.data.corpus import read_documents
from mixlm.errors import UserError, exits_on_user_error
from mixlm.progress import progress_bar
from mixlm.tokenization import train_tokenizer

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.jsonl"
BUDGETS = ("minutes", "tokens", "steps")
# What a line need not have, and what it has then.
OPTIONAL = {
    "fields": {},
    "arguments": {},
    "candidates": [],
    "stages": [],
    "held_out": {},
    "vocabulary": 8000,
    "keep_model": False,
    "task": None,
    "of": None,
}
TABLES = FOLDER / "tables"


def read_table(file: Path) -> list[dict[str, Any]]:
    """The runs of a table, one for each seed of each line.

    Raises:
        UserError: a line is not what it should be.
    """
    runs = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: is not JSON ({error})") from error
        known = {"name", "model", "seeds", *OPTIONAL, *BUDGETS}
        if unknown := sorted(set(fields) - known):
            raise UserError(f"{where}: {unknown[0]!r} is not known; use {', '.join(sorted(known))}")
        if missing := sorted({"name", "model", "seeds"} - set(fields)):
            raise UserError(f"{where}: {missing[0]!r} is missing")
        if len(set(fields) & set(BUDGETS)) != 1:
            raise UserError(f"{where}: give one of {', '.join(BUDGETS)}")
        for seed in fields.pop("seeds"):
            run = {**OPTIONAL, **fields, "seed": seed}
            runs.append({**run, "source_key": key_of_source(run, where)} if run["task"] else run)
    return runs


def key_of_source(run: dict[str, Any], where: str) -> str:
    """The key of the run whose model a run with a task fine-tunes.

    Raises:
        UserError: there is no such run, or it does not keep its model.
    """
    of = run["of"]
    if not isinstance(of, dict) or not {"table", "name"} <= of.keys() <= {"table", "name", "seed"}:
        raise UserError(f'{where}: a task is "of" a kept model: {{"table": ..., "name": ..., perhaps "seed": ...}}')
    table, seed = TABLES / f"{of['table']}.jsonl", of.get("seed", run["seed"])
    for each in read_table(table):
        if (each["name"], each["seed"]) == (of["name"], seed):
            if not each["keep_model"]:
                raise UserError(f'{where}: {of["name"]!r} of {table} does not keep its model; give "keep_model": true')
            return key_of(each)
    raise UserError(f"{where}: {table} has no {of['name']!r} with seed {seed}")


def key_of(run: dict[str, Any]) -> str:
    """What tells a run from others: all that is in it but its name, and the key but not the name of its source."""
    told = {name: value for name, value in run.items() if name not in ("name", "of") and OPTIONAL.get(name) != value}
    content = json.dumps(told, sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def read_results(file: Path) -> list[dict[str, Any]]:
    """The kept results; none where there is no file yet."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []


def keep(result: dict[str, Any], file: Path) -> None:
    """Append a result, whole, whatever other studies do at the same time."""
    with file.open("a", encoding="utf-8") as lines:
        fcntl.flock(lines, fcntl.LOCK_EX)
        lines.write(json.dumps(result, ensure_ascii=False) + "\n")


def prepare_tokenizer(corpus: str, vocabulary: int, work: Path) -> Path:
    """A tokenizer of so many pieces from the corpus."""
    folder = work / f"tokenizer-{vocabulary}"
    if not folder.is_dir():
        sentences = (sentence for document in read_documents(corpus) for sentence in document.sentences)
        partial = work / f"tokenizer-{vocabulary}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        train_tokenizer(sentences, vocabulary).save_pretrained(partial)
        partial.rename(folder)
    return folder


def source_of(run: dict[str, Any], work: Path) -> str:
    """The folder of the kept model that is to be fine-tuned.

    Raises:
        UserError: no such model was kept.
    """
    folder = work / "models" / run["source_key"]
    if not folder.is_dir():
        raise UserError(
            f"{run['name']}, seed {run['seed']}: {work} has no model of {run['of']['name']!r}; make the table "
            f"{run['of']['table']} there first"
        )
    return str(folder)


def make(run: dict[str, Any], paths: dict[str, str], work: Path, results: Path) -> str:
    """Make one run, in a process of its own, and keep what came of it; returns what went wrong, or nothing.

    Args:
        run: of a table.
        paths: of `corpus` and `questions`.
        work: the folder for everything but the results.
        results: the file they are appended to.
    """
    folder = work / key_of(run)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "specification.json"
    tokenizer = str(work / f"tokenizer-{run['vocabulary']}")
    try:
        source = {"source": source_of(run, work)} if run["task"] else {}
    except UserError as error:  # its pretraining has failed
        return str(error)
    file.write_text(json.dumps({**run, **paths, **source, "tokenizer": tokenizer}), "utf-8")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MIXLM_CACHE": str(work / "cache"),
        "PYTHONPATH": str(FOLDER.parents[1]),
    }
    with (folder / "log").open("a") as log:
        program = "fine_tune_one.py" if run["task"] else "train_one.py"
        command = [sys.executable, str(FOLDER / program), str(file), str(folder)]
        done = subprocess.run(command, env=environment, stdout=log, stderr=log)
    if done.returncode or not (folder / "result.json").is_file():
        return f"exit code {done.returncode}; see {folder / 'log'}"
    result = json.loads((folder / "result.json").read_text("utf-8"))
    if run["keep_model"]:
        kept = work / "models" / key_of(run)
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(exist_ok=True)
        shutil.move(folder / "model", kept)
    keep({**run, **result, "key": key_of(run), "when": time.strftime("%Y-%m-%d")}, results)
    shutil.rmtree(folder)
    return ""


@exits_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description="Make the runs of tables, several at once.")
    parser.add_argument("tables", nargs="+", type=Path, help="JSON lines; what a line is: see this file's beginning")
    parser.add_argument("--corpus_path", required=True, help="Folder or file of .dat, .dat.xz, .dat.gz.")
    parser.add_argument("--questions", help="SQuAD-style file, for lines with a task.")
    parser.add_argument("--work_dir", type=Path, default=Path(".cache/learning"), help="For checkpoints and the like.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Where results are kept (default: %(default)s).")
    parser.add_argument("--at_once", type=int, default=os.cpu_count(), help="Runs at the same time, a thread each.")
    arguments = parser.parse_args()

    known = {result["key"] for result in read_results(arguments.results)}
    runs = {key_of(run): run for table in arguments.tables for run in read_table(table)}
    # All of the first seeds before any of the second: a study that was stopped early has looked at every question.
    due = sorted((run for key, run in runs.items() if key not in known), key=lambda run: run["seed"])
    print(f"{len(runs)} runs, {len(runs) - len(due)} of them kept already")
    paths = {"corpus": arguments.corpus_path, "questions": arguments.questions}
    if any(run["task"] for run in due) and arguments.questions is None:
        raise UserError("--questions is missing: some lines have a task")
    work = arguments.work_dir.resolve()
    keys_of_due = {key_of(run) for run in due}
    for run in due:
        if run["task"] and run["source_key"] not in keys_of_due:
            source_of(run, work)  # what is missing is said before hours of other runs
    work.mkdir(parents=True, exist_ok=True)
    for vocabulary in sorted({run["vocabulary"] for run in due}):
        prepare_tokenizer(arguments.corpus_path, vocabulary, work)
    failed = 0
    with (
        ThreadPoolExecutor(arguments.at_once) as pool,
        progress_bar(total=len(due), unit="run", desc="study", delay=0) as progress,
    ):
        # What is fine-tuned must have been pretrained.
        for part in ([run for run in due if not run["task"]], [run for run in due if run["task"]]):
            makings = pool.map(lambda run: make(run, paths, work, arguments.results), part)
            for run, failure in zip(part, makings, strict=True):
                progress.update()
                if failure:
                    failed += 1
                    progress.write(f"{run['name']}, seed {run['seed']}: {failure}")
    if failed:
        raise UserError(f"{failed} of {len(due)} runs failed; started again, the study goes on with them")


if __name__ == "__main__":
    main()
