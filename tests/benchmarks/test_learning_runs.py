"""One run of a study: its budget, its stages, what it tries, and the models that it compares."""

import itertools
import json
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import candidates
import fine_tune_one
import metering
import models
import pytest
import search_quality
import study
import torch
import train_one
from accelerate import Accelerator
from safetensors.torch import load_file
from studies import LINE, SAMPLE, SMALL, TINY, Tokenizer, table

from mixlm import MixLMConfig, MixLMForRetrieval, cli
from mixlm.data.batching import Position
from mixlm.data.corpus import read_documents
from mixlm.encoder import MixLMEncoder
from mixlm.errors import RunStopped
from mixlm.tokenization import train_tokenizer
from mixlm.training.checkpoint import STATE_FILE, skeleton_of
from mixlm.training.optimization import OptimizerSettings
from mixlm.training.sharding.engine import Engine
from mixlm.training.stopping import StopRequest


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


@pytest.mark.parametrize("kind", ["mixlm", *models.PEERS])
def test_muon_has_no_table_and_no_head_of_any_model(kind):
    model = models.build_model(kind, TINY if kind == "mixlm" else SMALL, Tokenizer())
    with candidates.TRAININGS["muon"]():
        groups = OptimizerSettings(0.1, 0.0, 1e-8).groups(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    taken = [names[parameter] for group in groups if "matrices" in group for parameter in group["params"]]
    assert len(taken) >= 4
    assert not [name for name in taken if "head" in name or "embeddings.weight" in name or "predictions" in name]
    assert len(OptimizerSettings(0.1, 0.0, 1e-8).groups(model)) == 2


@pytest.mark.parametrize("muon", [False, True])
def test_embeddings_take_the_steps_of_their_own_rate_and_the_rest_those_of_the_other(muon):
    """Decay too, and in the second step as well: rates are not multiplied twice."""

    def after_two_steps(learning_rate: float, training: AbstractContextManager) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        model = models.build_model("mixlm", TINY, Tokenizer())
        with training:
            engine = Engine(model, OptimizerSettings(learning_rate, 0.3, 1e-8, muon), "fp32")
        for _ in range(2):
            for parameter in engine.parameters.values():
                parameter.grad = torch.randn_like(parameter)
            engine.step(learning_rate)
        return {name: parameter.detach() for name, parameter in engine.parameters.items()}

    found = after_two_steps(0.01, candidates.TRAININGS["embedding rate x 3"]())
    slow, fast = after_two_steps(0.01, nullcontext()), after_two_steps(0.03, nullcontext())
    tables = {name for name in found if name.endswith("_embeddings.weight")}
    assert len(tables) >= 2
    for name, tensor in found.items():
        assert torch.equal(tensor, (fast if name in tables else slow)[name])
        assert not torch.equal(slow[name], fast[name])


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


# Where the parts of a peer with LayerNorm before the branches are in transformers' own model of that kind.
AS_IN_PRE_LAYER_NORM = {
    "encoder.last_norm": "LayerNorm",
    "encoder.albert_layer_groups.0.albert_layers.": "encoder.layer.",
    "attention.query.norm": "attention.LayerNorm",
    "attention.self.norm": "attention.LayerNorm",
    "intermediate.norm": "intermediate.LayerNorm",
    "ffn.norm": "intermediate.LayerNorm",
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.dense": "attention.output.dense",
    "ffn_output": "output.dense",
    "ffn": "intermediate.dense",
}


@pytest.mark.parametrize("kind", ["bert", "electra", "albert"])
def test_layer_norm_before_branches_is_that_of_transformers(kind):
    torch.manual_seed(0)
    width = SMALL["hidden_size"]
    fields = SMALL | {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
    more = {} if kind == "bert" else {"embedding_size": width}
    peer = models.build_model(kind, fields | more, Tokenizer())
    candidates.NEW_MODELS["LayerNorm before branches"](peer, torch.zeros(len(Tokenizer())))
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # no LayerNorm is as another
        if kind == "albert":
            mapping = peer.base_model.encoder.embedding_hidden_mapping_in
            mapping.weight.copy_(torch.eye(width))
            mapping.bias.zero_()

    oracle = models.build_model("bert-pre-ln", fields, Tokenizer()).base_model
    weights = {}
    for name, tensor in peer.base_model.state_dict().items():
        for part, other in AS_IN_PRE_LAYER_NORM.items():
            name = name.replace(part, other)
        weights[name] = tensor
    # Its positions begin after the id of padding, at 1.
    positions = weights["embeddings.position_embeddings.weight"]
    weights["embeddings.position_embeddings.weight"] = torch.cat([positions[:1], positions])
    missing, unexpected = oracle.load_state_dict(weights, strict=False)
    assert not missing and all("mapping_in" in name or name.startswith("pooler") for name in unexpected)

    inputs = {"input_ids": torch.randint(4, 60, (2, 9)), "attention_mask": torch.ones(2, 9)}
    inputs["attention_mask"][1, 6:] = 0
    found, expected = (model(**inputs).last_hidden_state[0] for model in (peer.base_model, oracle))
    torch.testing.assert_close(found, expected)


def test_layer_norm_before_branches_of_convbert():
    torch.manual_seed(0)
    fields = SMALL | {"num_hidden_layers": 2, "embedding_size": SMALL["hidden_size"]}
    peer = models.build_model("convbert", fields, Tokenizer())
    candidates.NEW_MODELS["LayerNorm before branches"](peer, torch.zeros(len(Tokenizer())))
    ids = torch.randint(4, 60, (2, 9))
    hidden = peer.base_model.embeddings(ids)
    for layer in peer.base_model.encoder.layer:
        attention, intermediate = layer.attention.self, layer.intermediate
        # What a hook adds to a call is not in `forward`.
        hidden = hidden + layer.attention.output.dense(attention.forward(attention.norm(hidden))[0])
        hidden = hidden + layer.output.dense(intermediate.forward(intermediate.norm(hidden)))
    expected = peer.base_model.encoder.last_norm(hidden)
    torch.testing.assert_close(peer.base_model(ids).last_hidden_state, expected)


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
    result = make("killed")
    assert points(result) == points(whole) and "taken_up_at" not in whole
    expected = {"a point": [6], "a step between points": [6], "the last point": [21], "the result": None}
    assert result.get("taken_up_at") == expected[killed_at]


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
