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
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

FOLDER = Path(__file__).parents[2] / "benchmarks" / "learning"
sys.path.insert(0, str(FOLDER))

import candidates
import fine_tune_one
import metering
import models
import report
import study
import train_one

from mixlm.data.batching import Position
from mixlm.data.corpus import read_documents
from mixlm.errors import UserError
from mixlm.tokenization import train_tokenizer
from mixlm.training.checkpoint import skeleton_of
from mixlm.training.optimization import AdamW

SAMPLE = FOLDER.parents[1] / "mixlm" / "sample"
LINE = {"name": "a", "model": "mixlm", "steps": 10, "seeds": [1, 2]}
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}


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
    model = models.build_model("mixlm", {"hidden_size": 32, "ff_dim": 32, "num_hidden_layers": 1}, Tokenizer())
    labels = torch.full((2, 6), -100)
    labels[:, 2] = 7
    batch = {"input_ids": torch.full((2, 6), 7), "attention_mask": torch.ones(2, 6), "labels": labels}
    batch["sentence_order_label"] = torch.tensor([0, 1])
    objective = candidates.MaskedTokensObjective(Accelerator(cpu=True), model)
    loss, _ = objective.loss(batch, 0, objective.begin_step([batch]))
    torch.testing.assert_close(loss, model(**batch).mlm_loss)


def test_a_table_compares_with_its_first_line(tmp_path):
    def result(run, loss):
        return {**run, "key": study.key_of(run), "metrics": {"mlm_loss": loss, "mlm_accuracy": 0.5, "sop_accuracy": 1}}

    file = table(tmp_path, {**LINE, "name": "base"}, {**LINE, "name": "other", "fields": {"ln_pos": 1}})
    results = [result(run, loss) for run, loss in zip(study.read_table(file), [5.0, 6.0, 4.5, 5.7], strict=True)]
    for each in results:
        each["curve"] = [{"tokens": 2000}]
    rows = report.markdown(report.lines_of(file, results)).splitlines()[2:]
    assert rows == [
        "| base | 2 | 2k | 5.500 ± 0.707 |  | 50.0% | 100.0% |",
        "| other | 2 | 2k | 5.100 ± 0.849 | -0.400 ± 0.141 | 50.0% | 100.0% |",
    ]
    some = report.markdown(report.lines_of(file, results[:1])).splitlines()[2:]
    assert some == ["| base | 1 | 2k | 5.000 |  | 50.0% | 100.0% |", "", "1 of 4 runs are made."]
    assert report.markdown(report.lines_of(file, [])) == "Not run yet.\n"


def test_a_table_of_tasks_shows_what_they_are_judged_by(tmp_path):
    line = {"model": "mixlm", "of": "a", "minutes": 1}
    file = table(
        tmp_path,
        {**line, "name": "reads", "task": "reading", "seeds": [1, 2]},
        {**line, "name": "finds", "task": "retrieval", "seeds": [1]},
    )
    metrics = [{"exact_match": 1, "f1": 20}, {"exact_match": 3, "f1": 20}, {"accuracy@1": 5, "mrr@10": 7}]
    results = [
        {**run, "key": study.key_of(run), "steps": 1200, "metrics": of_run}
        for run, of_run in zip(study.read_table(file), metrics, strict=True)
    ]
    assert report.markdown(report.lines_of(file, results)).splitlines()[2:] == [
        "| reads | 2 | 1,200 | 2.0 ± 1.4 | 20.0 ± 0.0 |  |  |",
        "| finds | 1 | 1,200 |  |  | 5.0 | 7.0 |",
    ]


@pytest.mark.parametrize("task", ["reading", "retrieval"])
def test_a_kept_peer_is_fine_tuned(tmp_path, task):
    """By the scripts' own loop; a budget of nothing evaluates it as it is."""
    tokenizer = train_tokenizer((s for d in read_documents(SAMPLE) for s in d.sentences), 500, show_progress=False)
    peer = models.build_model("bert", SMALL, tokenizer)
    peer.masked_lm.save_pretrained(tmp_path / "kept")
    tokenizer.save_pretrained(tmp_path / "kept")
    articles = {"train_articles": "0:20", "validation_articles": "20:24"}
    specification = {"model": "bert", "task": task, "seed": 1, "minutes": 0, "arguments": articles}
    paths = {"source": str(tmp_path / "kept"), "questions": str(SAMPLE / "ko_questions.json")}
    result = fine_tune_one.fine_tune_one({**specification, **paths}, tmp_path)
    assert result["steps"] == 1 and 0 <= result["metrics"]["f1" if task == "reading" else "mrr@10"] <= 100
    if task == "retrieval":
        encoder, _ = models.PeerForRetrieval.load(str(tmp_path / "kept"))
        weights = load_file(tmp_path / "run" / "model.safetensors")
        for name, parameter in encoder.named_parameters():
            if "pooler" not in name:  # BERT's own, which is not used
                torch.testing.assert_close(weights[name], parameter.detach())


def test_a_model_that_was_not_kept_is_named(tmp_path):
    with pytest.raises(UserError, match="no model of 'nobody', seed 1 was kept"):
        study.source_of({"name": "a", "of": "nobody", "seed": 1}, tmp_path)


def test_the_page_shows_the_kept_results():
    """docs/experiments.md is what report.py makes of results.jsonl."""
    page = report.PAGE.read_text("utf-8")
    assert report.rewrite(page, study.read_results(study.RESULTS)) == page
    named = re.findall(r"<!-- table: (\w+) -->", page)
    assert sorted(named) == sorted(file.stem for file in (FOLDER / "tables").glob("*.jsonl"))


def test_curves_are_drawn(tmp_path):
    run = {**study.OPTIONAL, "minutes": 2, "steps": 4, "metrics": {"unigram_loss": 7.0}}
    curve = [{"step": step, "tokens": 1000 * step, "mlm_loss": 7 - step / 4} for step in (1, 2, 3, 4)]
    lines = [report.Line("a", {seed: {**run, "curve": curve} for seed in (1, 2)}, 2), report.Line("b", {}, 2)]
    assert report.minutes_of(lines[0].results[1]) == [0.5, 1.0, 1.5, 2.0]
    report.draw_curves(lines, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


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


def test_a_study_makes_a_run_and_keeps_it_once(tmp_path, monkeypatch, capsys):
    """A whole one, in processes of its own, and again: nothing is left to do."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    documents = list(read_documents(SAMPLE))[:20]
    text = "\n\n".join("\n".join(document.sentences) for document in documents)
    (corpus / "text.dat").write_text(text, "utf-8")
    line = {
        **LINE,
        "seeds": [1],
        "steps": 8,
        "vocabulary": 500,
        "keep_model": True,
        "fields": {"hidden_size": 32, "ff_dim": 32, "num_hidden_layers": 1},
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
