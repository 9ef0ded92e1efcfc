"""The tables and results of learning studies, and the programs that go through them."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import candidates
import fine_tune_one
import metering
import models
import pytest
import step_costs
import study
import train_one
from studies import LINE, OF, SAMPLE, SMALL, TASK, TINY, Tokenizer, kept_models, table
from transformers import AutoModelForMaskedLM

from mixlm.data.corpus import read_documents
from mixlm.errors import UserError


def test_a_line_is_a_run_for_each_seed(tmp_path):
    runs = study.read_table(table(tmp_path, LINE, "", {**LINE, "seeds": [3], "arguments": {"learning_rate": 1e-3}}))
    assert [(run["seed"], run["arguments"]) for run in runs] == [(1, {}), (2, {}), (3, {"learning_rate": 1e-3})]
    assert len({study.key_of(run) for run in runs}) == 3
    assert study.key_of({**runs[0], "name": "another"}) == study.key_of(runs[0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: is not JSON"),
        ({**LINE, "seed": 1}, "'seed' is not known"),
        ({"model": "mixlm", "steps": 1, "seeds": [1]}, "'name' is missing"),
        ({**LINE, "minutes": 4}, "give one of minutes, tokens, steps"),
        ({name: value for name, value in LINE.items() if name != "steps"}, "give one of minutes, tokens, steps"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        study.read_table(table(tmp_path, line))


@pytest.mark.parametrize("file", sorted(study.TABLES.glob("*.jsonl")), ids=lambda file: file.stem)
def test_the_tables_ask_for_what_there_is(file):
    for run in study.read_table(file):
        assert run["model"] in {*models.OWN, *models.PEERS}
        models.build_model(run["model"], run["fields"], Tokenizer())
        assert run["task"] is None or run["task"] in fine_tune_one.TASKS
        assert set(run["candidates"]) <= {*candidates.NEW_MODELS, *candidates.TRAININGS}
        for stage in [{}, *run["stages"]]:
            changed = {name: value for name, value in stage.items() if name != "from"}
            arguments = train_one.arguments_of(
                {**run, "corpus": "c", "tokenizer": "t"}, Path("x"), "run", num_steps=100
            )
            replace(arguments, **changed)


def test_a_task_is_another_run_when_its_source_is(tmp_path, monkeypatch):
    def keys():
        return [study.key_of(run) for run in study.read_table(table(tmp_path, TASK))]

    kept_models(tmp_path, monkeypatch)
    before = keys()
    assert len(set(before)) == 2 and keys() == before
    kept_models(tmp_path, monkeypatch, arguments={"learning_rate": 1e-3})
    assert not set(keys()) & set(before)


def test_seeds_of_a_task_can_share_a_model(tmp_path, monkeypatch):
    kept_models(tmp_path, monkeypatch, seeds=[1])
    runs = study.read_table(table(tmp_path, {**TASK, "of": {**OF, "seed": 1}}))
    assert len({run["source_key"] for run in runs}) == 1 and len({study.key_of(run) for run in runs}) == 2


@pytest.mark.parametrize("of", [None, "a", {"name": "a"}, {**OF, "seeds": [1]}])
def test_a_task_says_whose_it_is(tmp_path, monkeypatch, of):
    kept_models(tmp_path, monkeypatch)
    with pytest.raises(UserError, match='line 1: a task is "of" a kept model'):
        study.read_table(table(tmp_path, {**TASK, "of": of}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keep_model": False}, "line 1: 'a' of .* does not keep its model"),
        ({"name": "b"}, "line 1: .* has no 'a' with seed 1"),
        ({"seeds": [1]}, "line 1: .* has no 'a' with seed 2"),
    ],
)
def test_a_task_needs_a_line_that_keeps_its_model(tmp_path, monkeypatch, changed, message):
    kept_models(tmp_path, monkeypatch, **changed)
    with pytest.raises(UserError, match=message):
        study.read_table(table(tmp_path, TASK))


def test_kept_results_have_the_keys_of_their_runs():
    """What tells runs from each other may not change, or all of them would be made again."""
    for result in study.read_results(study.RESULTS):
        budget = next(name for name in study.BUDGETS if name in result)  # beside it, `steps` are what it became
        told = {"name", "model", "seed", "source_key", budget, *study.OPTIONAL}
        assert study.key_of({name: value for name, value in result.items() if name in told}) == result["key"]


def test_results_are_kept_line_by_line(tmp_path):
    file = tmp_path / "results.jsonl"
    assert study.read_results(file) == []
    for number in range(3):
        study.keep({"key": str(number), "name": "한글"}, file)
    assert [result["key"] for result in study.read_results(file)] == ["0", "1", "2"]


def test_what_is_pretrained_in_the_same_study_is_fine_tuned_after_it(tmp_path, monkeypatch, capsys):
    kept_models(tmp_path, monkeypatch)
    made = []
    monkeypatch.setattr(study, "make", lambda run, *_: made.append((run["name"], run["seed"])) or "")
    monkeypatch.setattr(study, "prepare_tokenizer", lambda *_: None)
    tasks = table(tmp_path, TASK)
    options = ["--corpus_path", "c", "--questions", "q", "--work_dir", str(tmp_path / "work"), "--at_once", "1"]
    files = [str(tasks), str(tmp_path / "kept.jsonl")]
    monkeypatch.setattr(sys, "argv", ["study.py", *files, *options, "--results", str(tmp_path / "results.jsonl")])
    study.main.__wrapped__()
    assert made == [("a", 1), ("a", 2), ("reads", 1), ("reads", 2)]


def test_a_model_that_was_not_kept_is_named_before_any_run(tmp_path, monkeypatch):
    kept_models(tmp_path, monkeypatch)
    monkeypatch.setattr(study, "make", lambda *_: pytest.fail("a run was made"))
    monkeypatch.setattr(study, "prepare_tokenizer", lambda *_: pytest.fail("a tokenizer was made"))
    file = table(tmp_path, {**LINE, "seeds": [1]}, {**TASK, "seeds": [2]})
    options = ["--corpus_path", "c", "--questions", "q", "--work_dir", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["study.py", str(file), *options, "--results", str(tmp_path / "results.jsonl")])
    with pytest.raises(UserError, match="reads, seed 2: .* has no model of 'a'; make the table kept"):
        study.main.__wrapped__()


@pytest.fixture
def corpus(tmp_path):
    """A folder with twenty of the sample's documents."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    documents = list(read_documents(SAMPLE))[:20]
    text = "\n\n".join("\n".join(document.sentences) for document in documents)
    (folder / "text.dat").write_text(text, "utf-8")
    return folder


def test_the_costs_of_steps_are_those_of_the_fastest_rounds(tmp_path, corpus, monkeypatch, capsys):
    """Lines take turns, and a line that two tables have is timed once a round."""
    one, other = {**LINE, "fields": TINY}, {**LINE, "name": "b", "model": "bert", "fields": SMALL}
    seconds, trained = iter([3.0, 8.0, 2.0, 5.0]), []

    def time_steps(train):
        try:
            train(metering.TimingMeter())
        except metering.EnoughTimed:
            trained.append(train.args[0]["name"])
        return next(seconds), 100.0

    monkeypatch.setattr(step_costs, "time_steps", time_steps)
    monkeypatch.setenv("MIXLM_CACHE", "")
    file = str(table(tmp_path, *({**line, "vocabulary": 500} for line in (one, other))))
    arguments = ["--corpus_path", str(corpus), "--work_dir", str(tmp_path / "work"), "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["step_costs.py", file, file, *arguments])
    step_costs.main()
    assert capsys.readouterr().out == " 1.000  a\n 2.500  b\n" and trained == ["a", "b", "a", "b"]


@pytest.mark.parametrize("program", ["study.py", "step_costs.py"])
def test_the_programs_run_as_printed(program):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, f"benchmarks/learning/{program}", "--help"]
    done = subprocess.run(command, cwd=SAMPLE.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "--corpus_path" in done.stdout, done.stderr


def test_a_study_makes_a_run_and_keeps_it_once(tmp_path, corpus, monkeypatch, capsys):
    """A whole one, in processes of its own, and again: nothing is left to do."""
    line = {
        **LINE,
        "seeds": [1],
        "steps": 8,
        "vocabulary": 500,
        "keep_model": True,
        "fields": TINY,
    }
    file = table(tmp_path, line)
    results = tmp_path / "results.jsonl"
    arguments = [
        str(file),
        "--corpus_path",
        str(corpus),
        "--work_dir",
        str(tmp_path / "work"),
        "--results",
        str(results),
    ]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["study.py", *arguments])
        study.main()
    assert "1 of them kept already" in capsys.readouterr().out
    (result,) = study.read_results(results)
    assert [point["step"] for point in result["curve"]] == list(range(1, 9))
    assert result["steps"] == 8 and result["curve"][-1]["tokens"] > 0
    assert not (tmp_path / "work" / result["key"]).exists()
    kept = AutoModelForMaskedLM.from_pretrained(tmp_path / "work" / "models" / result["key"])
    assert sum(each.numel() for each in kept.parameters()) < result["parameters"]  # without the head for the order
