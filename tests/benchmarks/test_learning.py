"""The runner of learning studies: its tables, its results, and the models it compares."""

import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from matplotlib.axes import Axes
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

FOLDER = Path(__file__).parents[2] / "benchmarks" / "learning"
sys.path.insert(0, str(FOLDER))

import candidates
import fine_tune_one
import metering
import models
import report
import search_quality
import step_costs
import study
import train_one

from mixlm import MixLMConfig, MixLMForRetrieval, cli
from mixlm.data.batching import Position
from mixlm.data.corpus import read_documents
from mixlm.encoder import MixLMEncoder
from mixlm.errors import RunStopped, UserError
from mixlm.tokenization import train_tokenizer
from mixlm.training.checkpoint import STATE_FILE, skeleton_of
from mixlm.training.optimization import AdamW
from mixlm.training.stopping import StopRequest

SAMPLE = FOLDER.parents[1] / "mixlm" / "sample"
LINE = {"name": "a", "model": "mixlm", "steps": 10, "seeds": [1, 2]}
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}

TINY = {"hidden_size": 32, "ff_dim": 32, "num_hidden_layers": 1}


class Tokenizer:
    pad_token_id, cls_token_id, sep_token_id = 0, 2, 3

    def __len__(self):
        return 60


def table(folder: Path, *lines) -> Path:
    file = folder / "table.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return file


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


@pytest.mark.parametrize("file", sorted((FOLDER / "tables").glob("*.jsonl")), ids=lambda file: file.stem)
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


def kept_models(folder: Path, monkeypatch, **changed) -> None:
    """Let there be a table `kept` with a line `a`."""
    (folder / "kept.jsonl").write_text(json.dumps({**LINE, "keep_model": True, **changed}), "utf-8")
    monkeypatch.setattr(study, "TABLES", folder)


OF = {"table": "kept", "name": "a"}
TASK = {"name": "reads", "model": "mixlm", "task": "reading", "of": OF, "minutes": 1, "seeds": [1, 2]}


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


@pytest.mark.parametrize(
    ("budget", "steps"), [({"steps": 7}, 7), ({"tokens": 5000}, 50), ({"minutes": 2}, 240), ({"minutes": 0.001}, 8)]
)
def test_a_budget_is_a_number_of_steps(budget, steps):
    assert train_one.number_of_steps(budget, lambda: (0.5, 100.0)) == steps


def test_stages_follow_one_another_and_resume_in_any():
    """A run that goes on after any step has the steps of one that was never stopped."""

    def counted(name):
        def batches(position):
            for number in itertools.count(position.batch):
                yield Position(epoch=position.epoch, batch=number + 1), [(name, position.epoch, number)]

        return batches

    stages = [(0, counted("a")), (3, counted("b")), (5, counted("c"))]
    whole = list(itertools.islice(train_one.StagedBatches(stages, 0)(Position()), 8))
    assert "".join(batches[0][0] for _, batches in whole) == "aaabbccc"
    assert len({batches[0] for _, batches in whole}) == 8
    for done in range(1, 8):
        position = whole[done - 1][0]
        resumed = train_one.StagedBatches(stages, done)(position)
        assert list(itertools.islice(resumed, 8 - done)) == whole[done:]


def test_muon_moves_matrices_by_orthogonal_steps():
    torch.manual_seed(0)
    model = models.build_model("mixlm", {"hidden_size": 64, "ff_dim": 64, "num_hidden_layers": 1}, Tokenizer())
    optimizer = candidates.build_muon(AdamW(learning_rate=0.1, weight_decay=0.0, epsilon=1e-8), model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        change = (parameter - before[name]).detach()
        if "stack" in name and name.endswith("weight") and "norm" not in name:
            groups = 4 if "convolution" in name else 1
            rows = len(change) // groups
            matrices = change.reshape(groups, rows, -1) / (0.1 * 0.2 * max(rows, change[0].numel()) ** 0.5)
            assert (torch.linalg.svdvals(matrices) - 1).abs().max() < 0.4, name
        else:  # the first step of AdamW: the sign of the gradient
            torch.testing.assert_close(change, -0.1 * parameter.grad.sign(), rtol=1e-3, atol=1e-5)


def test_the_cosine_rises_to_the_peak_and_falls_to_nothing():
    rates = [candidates.cosine(step, 10, 100, 1.0) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert max(rates) == 1.0 and rates[-1] == pytest.approx(0.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_masked_tokens_alone_leave_the_order_out():
    torch.manual_seed(0)
    model = models.build_model("mixlm", TINY, Tokenizer())
    labels = torch.full((2, 6), -100)
    labels[:, 2] = 7
    batch = {"input_ids": torch.full((2, 6), 7), "attention_mask": torch.ones(2, 6), "labels": labels}
    batch["sentence_order_label"] = torch.tensor([0, 1])
    objective = candidates.MaskedTokensObjective(Accelerator(cpu=True), model)
    loss, _ = objective.loss(batch, 0, objective.begin_step([batch]))
    torch.testing.assert_close(loss, model(**batch).mlm_loss)


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
    assert report.markdown(report.lines_of(file, [])) == "Not run yet.\n"


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


@pytest.mark.parametrize("task", ["reading", "retrieval"])
def test_a_kept_peer_is_fine_tuned(tmp_path, task):
    """By the scripts' own loop; a budget of nothing evaluates it as it is."""
    tokenizer = train_tokenizer((s for d in read_documents(SAMPLE) for s in d.sentences), 500, show_progress=False)
    peer = models.build_model("bert", SMALL, tokenizer)
    peer.masked_lm.save_pretrained(tmp_path / "kept")
    tokenizer.save_pretrained(tmp_path / "kept")
    articles = {"train_articles": "0:20", "validation_articles": "20:24"}
    articles |= {"judged_on": "24:28"} if task == "retrieval" else {}
    specification = {"model": "bert", "task": task, "seed": 1, "steps": 0, "arguments": articles}
    paths = {"source": str(tmp_path / "kept"), "questions": str(SAMPLE / "ko_questions.json")}
    result = fine_tune_one.fine_tune_one({**specification, **paths}, tmp_path)
    judged_by = "f1" if task == "reading" else "all questions/hybrid/mrr@10"
    assert result["steps"] == 0 and 0 <= result["metrics"][judged_by] <= 100
    if task == "retrieval":
        encoder, _ = models.PeerForRetrieval.load(str(tmp_path / "kept"))
        weights = load_file(tmp_path / "run" / "model.safetensors")
        for name, parameter in encoder.named_parameters():
            if "pooler" not in name:  # BERT's own, which is not used
                torch.testing.assert_close(weights[name], parameter.detach())


def test_search_is_judged_as_by_the_commands(tmp_path, capsys):
    """A new encoder's hits of each kind are worth what `mixlm tune`, `search` and `evaluate` say."""
    torch.manual_seed(0)
    sentences = [sentence for document in read_documents(SAMPLE) for sentence in document.sentences]
    tokenizer = train_tokenizer(sentences, 500, show_progress=False)
    config = MixLMConfig(vocab_size=len(tokenizer), num_heads=4, max_position_embeddings=256, pooler="mean", **TINY)
    MixLMForRetrieval(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    file = SAMPLE / "ko_questions.json"
    encoder = MixLMEncoder.from_pretrained(tmp_path / "model")
    found = search_quality.search_quality(encoder, file, tmp_path / "in-memory", "0:8", "8:16")

    def command(*arguments):
        cli.main([*map(str, arguments)])
        return capsys.readouterr().out

    folders = [tmp_path / name for name in ("vectors", "index")]
    command("encode", "--model", tmp_path / "model", "--passages", file, "--out", folders[0])
    command("index", "--vectors", folders[0], "--out", folders[1])
    command("tune", "--index", folders[1], "--queries", file, "--qrels", file, "--articles", "0:8")
    for mode in ("lexical", "dense", "hybrid"):
        run = tmp_path / f"{mode}.trec"
        searching = ("search", "--index", folders[1], "--queries", file, "--top_k", 100, "--mode", mode, "--out", run)
        command(*searching)
    judged = ["--qrels", file, "--articles", "8:16", "--passages", file, "--compare", tmp_path / "lexical.trec"]
    for mode in ("dense", "hybrid"):
        printed = json.loads(command("evaluate", "--hits", tmp_path / f"{mode}.trec", *judged, "--json"))
        for name in ("accuracy@1", "mrr@10", "answer_accuracy@5"):
            assert found[f"{mode}/{name}"] == pytest.approx(printed["hits"][name])
            assert found[f"lexical/{name}"] == pytest.approx(printed["compare"][name])
            if mode == "hybrid":
                assert found[f"gain/{name}"] == pytest.approx(printed["difference"][name]["mean"])
                assert found[f"p/{name}"] == pytest.approx(printed["difference"][name]["p_value"])


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


def test_the_page_shows_the_kept_results():
    """docs/experiments.md is what report.py makes of results.jsonl."""
    page = report.PAGE.read_text("utf-8")
    assert report.rewrite(page, study.read_results(study.RESULTS)) == page
    named = re.findall(r"<!-- table: (\w+) -->", page)
    assert sorted(named) == sorted(file.stem for file in (FOLDER / "tables").glob("*.jsonl"))


def test_curves_are_drawn(tmp_path):
    run = {**study.OPTIONAL, "steps": 4, "metrics": {"unigram_loss": 7.0}}
    curve = [{"step": step, "tokens": 1000 * step, "mlm_loss": 7 - step / 4} for step in (1, 2, 3, 4)]
    lines = [report.Line("a", {seed: {**run, "curve": curve} for seed in (1, 2)}, 2), report.Line("b", {}, 2)]
    assert report.minutes_of(lines[0].results[1]) == [15, 30, 45, 60]
    report.draw_curves(lines, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_seeds_are_averaged_at_like_places(tmp_path, monkeypatch):
    """Curves of 4 and of 8 points, of runs whose budget became other numbers of steps, on one straight line."""
    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axis, *xy, **more: drawn.append(xy) or plot(axis, *xy, **more))
    results = {}
    for seed, steps, first, distance in [(1, 40, 10, 10), (2, 80, 20, 5)]:
        curve = [
            {"step": step, "tokens": 50_000 * step, "mlm_loss": 7 - 2 * step / steps}
            for step in range(first, steps + 1, distance)
        ]
        results[seed] = {"steps": steps, "curve": curve, "metrics": {"unigram_loss": 7.0}}
    report.draw_curves([report.Line("a", results, 2)], tmp_path / "curves.png")
    (minutes, by_minutes), (tokens, by_tokens) = drawn
    assert (minutes[0], minutes[-1]) == (15, 60) and (tokens[0], tokens[-1]) == (1.0, 2.0)
    assert by_minutes == pytest.approx(7 - minutes / 30)
    assert by_tokens == pytest.approx(7 - (tokens + tokens / 2) / 2)


def test_a_run_goes_on_where_the_curve_has_a_point(tmp_path):
    """Stopped between two points, or killed before a point was written, it goes back to the last of both."""
    for step in (75, 130, 150):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        (folder / STATE_FILE).write_text("{}")
    curve = [{"step": 75}, {"step": 225}]
    assert train_one.step_with_point(tmp_path, curve) == 75
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000075"]
    assert train_one.step_with_point(tmp_path, []) == 0 and not list(tmp_path.iterdir())
    assert train_one.step_with_point(tmp_path / "nothing", []) == 0


@pytest.mark.parametrize("killed_at", ["a point", "a step between points", "the last point", "the result"])
def test_a_killed_run_has_the_curve_of_one_that_was_not(tmp_path, monkeypatch, killed_at):
    class Killed(BaseException):
        pass

    def killing(function, number):
        calls = itertools.count(1)

        def counted(*arguments, **more):
            if next(calls) == number:
                raise Killed
            return function(*arguments, **more)

        return counted

    tokenizer = train_tokenizer((s for d in read_documents(SAMPLE) for s in d.sentences), 500, show_progress=False)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (run, *_) = study.read_table(table(tmp_path, {**LINE, "steps": 24, "fields": TINY}))
    specification = {**run, "corpus": str(SAMPLE), "tokenizer": str(tmp_path / "tokenizer")}
    monkeypatch.setenv("MIXLM_CACHE", str(tmp_path / "cache"))

    def make(name):
        (tmp_path / name).mkdir(exist_ok=True)
        return train_one.train_one(specification, tmp_path / name)

    def points(result):
        return [{name: value for name, value in each.items() if name != "cpu_seconds"} for each in result["curve"]]

    whole = make("whole")
    assert [each["step"] for each in whole["curve"]] == list(range(3, 25, 3))
    with monkeypatch.context() as patches:
        match killed_at:
            case "a point":
                patches.setattr(train_one, "evaluate_pretraining", killing(train_one.evaluate_pretraining, 3))
            case "the last point":
                patches.setattr(train_one, "evaluate_pretraining", killing(train_one.evaluate_pretraining, 8))
            case "the result":
                patches.setattr(train_one, "characters_per_token", killing(train_one.characters_per_token, 1))
            case "a step between points":  # by a signal, so that a checkpoint is written there
                stops = itertools.count(1)
                reason = lambda request: "stopped" if next(stops) == 8 else None  # noqa: E731
                patches.setattr(StopRequest, "reason", reason)
        with pytest.raises((Killed, RunStopped)):
            make("killed")
    assert points(make("killed")) == points(whole)


def test_the_meter_counts_steps_and_not_what_lies_between(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(metering.time, "process_time", lambda: now.seconds)
    meter = metering.Meter(seconds=100.0, tokens=1000)
    batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
    for number, _ in enumerate(meter.over(iter([(Position(), [batch, batch])] * 3))):
        now.seconds += 1.0
        if number == 1:
            meter.pause()
            now.seconds += 50.0
            meter.resume()
    meter.pause()
    assert (meter.seconds, meter.tokens) == (103.0, 1000 + 3 * 4)


def test_the_cost_of_a_step_is_that_of_the_fastest_round(tmp_path, monkeypatch):
    now, seconds_of_a_step = SimpleNamespace(seconds=0.0), iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(metering.time, "process_time", lambda: now.seconds)

    def train(meter):
        now.seconds += 100.0  # the start
        own = next(seconds_of_a_step)
        batch = {"attention_mask": torch.ones(2, 3), "context_attention_mask": torch.ones(2, 2)}
        for number, _ in enumerate(meter.over(iter([(Position(), [batch])] * 1000))):
            now.seconds += own if number >= metering.STEPS_BEFORE_TIMING else 50.0

    file = tmp_path / "cost.json"
    assert metering.cost_of_a_step(train, file) == (1.0, 10.0)
    assert metering.cost_of_a_step(train, file) == (1.0, 10.0)  # kept


@pytest.mark.parametrize("kind", models.PEERS)
def test_a_peer_scores_labelled_tokens_with_its_own_head(kind):
    """As its own ForMaskedLM does: the same loss, without scoring what has no label."""
    fields = {**SMALL, **({"embedding_size": 16} if kind in ("albert", "electra") else {})}
    fields |= {"embedding_size": 32} if kind == "convbert" else {}
    torch.manual_seed(0)
    model = models.build_model(kind, fields, Tokenizer()).eval()
    input_ids = torch.randint(5, 60, (3, 8))
    labels = torch.where(torch.rand(3, 8) < 0.4, input_ids, -100)
    order = torch.tensor([0, 1, -100])
    mask = torch.ones_like(input_ids)
    found = model(input_ids=input_ids, attention_mask=mask, labels=labels, sentence_order_label=order)
    expected = model.masked_lm(input_ids=input_ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(found.mlm_loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.prediction_logits, expected.logits[labels != -100], rtol=1e-4, atol=1e-5)
    names = {name for name, _ in model.named_parameters()}
    assert names == {name for name, _ in skeleton_of(model).named_parameters()}
    counts = models.parameter_counts(model)
    assert 0 < counts["non_embedding_parameters"] < counts["parameters"]


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
