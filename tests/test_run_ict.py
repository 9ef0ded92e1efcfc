"""run_ict.py from the arguments to the finished retriever, and what a user can get wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mixlm
from mixlm.data.passages import Passage
from mixlm.data.squad import ReadingExample, read_squad
from mixlm.encoder import Encoding, MixLMEncoder
from mixlm.errors import UserError
from mixlm.tokenization import load_tokenizer, train_tokenizer
from mixlm.training.arguments import parse_arguments
from mixlm.training.report import read_curves
from mixlm.training.retrieval import RetrievalArguments, pairs_of_corpus

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))

import run_ict

SAMPLE = REPOSITORY / "mixlm" / "sample"
ENGLISH, UNANSWERABLE, CORPUS = (
    SAMPLE / name for name in ("en_questions.json", "questions_v2.json", "en_articles.dat")
)
MODELS = {
    "mixlm": (mixlm.MixLMForPreTraining, {"kernel_size": 5, "ff_dim": 64}),
    "switch": (mixlm.MixLMSwitchForMaskedLM, {"ff_dim": 32}),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A tokenizer and a pretrained model of each family."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = [text for example in read_squad(ENGLISH).examples for text in (example.question, example.context)]
    tokenizer = train_tokenizer(texts, 800, show_progress=False)
    for name, (model_class, fields) in MODELS.items():
        common = {"hidden_size": 32, "num_hidden_layers": 2, "n_experts": 2, "num_heads": 2, "dropout_prob": 0.0}
        torch.manual_seed(0)
        config = model_class.config_class(
            vocab_size=len(tokenizer), max_position_embeddings=48, initializer_range=0.2, **common, **fields
        )
        model_class(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def flags(prepared, tmp_path):
    """(changes) -> the arguments of a short run; None leaves one out."""

    def make(**changes) -> list[str]:
        source = (
            {"corpus_path": None} if "corpus_path" in changes else {"train_file": ENGLISH, "validation_split": 0.2}
        )
        defaults = {
            "model_name_or_path": prepared / "mixlm",
            "output_dir": tmp_path / "out",
            "max_query_length": 16,
            "max_passage_length": 40,
            "train_batch_size": 8,
            "num_steps": 2,
            "logging_steps": 1,
            "num_workers": 0,
            **source,
        }
        given = {name: value for name, value in {**defaults, **changes}.items() if value is not None}
        return [
            part
            for name, value in given.items()
            for part in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
        ]

    return make


@pytest.fixture
def run(flags, tmp_path, monkeypatch):
    """(changes) -> the folder of a short run of the script in this process."""

    def run_main(**changes) -> Path:
        monkeypatch.setattr(sys, "argv", ["run_ict.py", *flags(**changes)])
        run_ict.main.__wrapped__()
        return Path(changes.get("output_dir", tmp_path / "out"))

    return run_main


def results(folder: Path) -> dict[str, float]:
    found = json.loads((folder / "eval_results.json").read_text("utf-8"))
    return {name.removeprefix("eval/"): value for name, value in found.items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def losses(folder: Path) -> list[float]:
    return [value for _, value in read_curves(folder)["train/ict_loss"]]


def assert_same_weights(found: Path, expected: Path, **tolerance) -> None:
    one, other = weights(found), weights(expected)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **{"rtol": 0, "atol": 0, **tolerance}, msg=name)


def assert_metrics(folder: Path, ranks: np.ndarray) -> None:
    """Those of a run's folder are the ones of these ranks of the right passages, from 1."""
    found = results(folder)
    for cutoff in (1, 5, 10):
        assert found[f"accuracy@{cutoff}"] == pytest.approx(100 * np.mean(ranks <= cutoff))
    assert found["mrr@10"] == pytest.approx(100 * np.mean(np.where(ranks <= 10, 1 / ranks, 0)))
    assert found["map"] == pytest.approx(100 * np.mean(1 / ranks))


def search(folder: Path, asked: list[ReadingExample], passages: list[tuple[str, str]]) -> np.ndarray:
    """The scores of all passages for these questions, from the vectors of the finished encoder."""
    encoder = MixLMEncoder.from_pretrained(folder, device="cpu", batch_size=7)
    queries = encoder.encode_queries([example.question for example in asked])
    return queries @ encoder.encode_passages([Passage("", title, text) for title, text in passages]).T


def passages_of(examples: list[ReadingExample]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((example.title, example.context) for example in examples))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_steps": 30, "eval_steps": 10, "learning_rate": 5e-3},
        {"two_towers": True, "normalize": True, "temperature": 0.05, "pooler": "mean"},
        {"model_name_or_path": "switch", "pooler": "cls"},
    ],
    ids=["learns", "two towers", "switch"],
)
def test_the_metrics_are_those_of_the_finished_encoder(run, prepared, changes):
    if "model_name_or_path" in changes:
        changes = {**changes, "model_name_or_path": prepared / changes["model_name_or_path"]}
    folder = run(validation_articles="11:14", **changes)
    examples = read_squad(ENGLISH).examples
    asked, passages = [example for example in examples if example.article >= 11], passages_of(examples)
    scores = search(folder, asked, passages)
    own = [passages.index((example.title, example.context)) for example in asked]
    ranks = 1 + (scores > scores[np.arange(len(own)), own][:, None]).sum(axis=1)
    assert_metrics(folder, ranks)
    if changes.get("num_steps") == 30:
        assert np.mean(losses(folder)[-5:]) < 0.8 * np.mean(losses(folder)[:5])
    config = mixlm.MixLMConfig.from_pretrained(folder)
    asked_for = {"two_towers": False, "normalize": False, "pooler": "decoder", **changes}
    assert config.two_towers == asked_for["two_towers"] and config.normalize_embeddings == asked_for["normalize"]
    assert config.pooler == asked_for["pooler"]
    assert Encoding.load(folder) == Encoding(16, 40)


def test_text_without_questions(run, flags, tmp_path):
    changes = {"corpus_path": CORPUS, "cache_dir": tmp_path / "cache", "eval_split": 0.3, "max_eval_examples": 25}
    folder = run(**changes)
    arguments = parse_arguments(RetrievalArguments, flags(**changes))
    encoder = MixLMEncoder.from_pretrained(folder, device="cpu")
    tokenizer = load_tokenizer(str(folder))
    data = pairs_of_corpus(arguments, tokenizer, encoder.tokenizer)
    assert len(data.queries) == len(data.passages) == 25
    with torch.no_grad():
        queries = torch.cat([encoder.model(torch.tensor(ids)[None]).embeddings for ids in data.queries.texts])
        passages = torch.cat([encoder.model(torch.tensor(ids)[None]).embeddings for ids in data.passages.texts])
    scores = queries @ passages.T
    assert_metrics(folder, 1 + (scores > scores.diagonal()[:, None]).sum(dim=1).numpy())
    for query, passage in zip(data.queries.texts, data.passages.texts, strict=True):
        sentence = query[1:-1].tolist()
        others = passage.tolist()
        assert not any(others[first : first + len(sentence)] == sentence for first in range(len(others)))
    assert {"eval/accuracy@1", "train/ict_accuracy"} <= read_curves(folder).keys()


def test_an_interrupted_run_goes_on_and_is_the_same(run, tmp_path):
    """Where it ends it is evaluated, which can be best: so the whole one is evaluated there too."""
    whole = run(output_dir=tmp_path / "whole", num_steps=4, eval_steps=2)
    run(output_dir=tmp_path / "parts", num_steps=2, eval_steps=2, scheduler_num_steps=4, save_steps=1)
    parts = run(output_dir=tmp_path / "parts", num_steps=4, eval_steps=2, resume="auto")
    assert_same_weights(parts, whole)
    assert results(parts) == results(whole)


@pytest.mark.parametrize("changes", [{}, {"null_passage": True, "train_file": UNANSWERABLE}], ids=["v1", "v2"])
def test_gradient_caching_trains_the_same_model(run, tmp_path, changes):
    given = {"num_steps": 3, "adam_epsilon": 1e-3, "learning_rate": 1e-2, **changes}
    whole = run(output_dir=tmp_path / "whole", **given)
    cached = run(output_dir=tmp_path / "cached", cache_chunk=2, **given)
    assert_same_weights(cached, whole, rtol=1e-4, atol=1e-5)
    assert losses(cached) == pytest.approx(losses(whole), rel=1e-4) and len(losses(whole)) == 3


def test_several_processes_train_the_same_model(run, flags, tmp_path):
    given = {"null_passage": True, "train_file": UNANSWERABLE, "adam_epsilon": 1e-3, "learning_rate": 1e-2}
    whole = run(output_dir=tmp_path / "whole", **given)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "run_ict.py"]
    shared = flags(output_dir=tmp_path / "shared", train_batch_size=4, cache_chunk=2, zero=3, **given)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, *shared], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "shared", whole, rtol=1e-4, atol=1e-5)
    assert results(tmp_path / "shared") == pytest.approx(results(whole), abs=1e-3)
    assert Encoding.load(tmp_path / "shared") == Encoding(16, 40, null_passage=True)


def test_unanswerable_questions_need_their_flag(run, capsys):
    run(train_file=UNANSWERABLE, num_steps=1)
    assert "80 questions have no answer and are left out; --null_passage uses them" in capsys.readouterr().out


def test_an_unanswerable_question_belongs_to_the_passage_without_text(run):
    folder = run(train_file=UNANSWERABLE, null_passage=True, validation_articles="60:80")
    assert Encoding.load(folder).null_passage
    examples = read_squad(UNANSWERABLE).examples
    asked, passages = [example for example in examples if example.article >= 60], passages_of(examples)
    scores = search(folder, asked, passages)
    encoder = MixLMEncoder.from_pretrained(folder, device="cpu")
    empty = encoder.encode_queries([example.question for example in asked]) @ encoder.encode_empty_passage()
    has_none = np.array([example.is_impossible for example in asked])
    right = np.mean((empty > scores.max(axis=1)) == has_none)
    assert results(folder)["no_answer_accuracy"] == pytest.approx(100 * right)
    own = [passages.index((each.title, each.context)) for each in asked if not each.is_impossible]
    answered = scores[~has_none]
    assert_metrics(folder, 1 + (answered > answered[np.arange(len(own)), own][:, None]).sum(axis=1))


def test_several_seeds_have_a_mean(run, capsys):
    folder = run(seeds=[1, 2], num_steps=1)
    summary = json.loads((folder / "seeds.json").read_text("utf-8"))
    values = [results(folder / f"seed-{seed}")["mrr@10"] for seed in (1, 2)]
    assert summary["mrr@10"]["values"] == values and summary["mrr@10"]["mean"] == pytest.approx(np.mean(values))
    assert "±" in capsys.readouterr().out and Encoding.load(folder / "seed-2") is not None


def test_hard_negatives_are_trained_with_and_not_searched(run, tmp_path, capsys):
    file = tmp_path / "negatives.jsonl"
    negatives = [{"title": "", "text": f"Another text, number {number}."} for number in range(3)]
    lines = [json.dumps({"id": each.id, "negatives": negatives}) for each in read_squad(ENGLISH).examples]
    file.write_text("\n".join(lines), "utf-8")
    given = {"num_steps": 1, "validation_articles": "11:14"}
    without = run(output_dir=tmp_path / "without", **given)
    folder = run(output_dir=tmp_path / "with", hard_negatives=file, num_hard_negatives=2, **given)
    assert capsys.readouterr().out.count("15 queries search 14 passages") == 2
    assert losses(folder)[0] > losses(without)[0]


def test_paragraphs_of_all_articles_are_searched(run, capsys):
    """Also those of articles that are neither trained on nor evaluated on."""
    run(num_steps=1, train_articles="0:5", validation_articles="11:14")
    everything = len(passages_of(read_squad(ENGLISH).examples))
    assert f"15 queries search {everything} passages" in capsys.readouterr().out


def test_the_candidates_of_a_question_are_counted(run):
    """Questions of one paragraph share a candidate."""
    folder = run(num_steps=3)
    counts = [value for _, value in read_curves(folder)["train/ict_candidates"]]
    assert len(counts) == 3 and all(1 < count <= 8 for count in counts)


def test_a_batch_size_is_found_that_the_data_has(run, tmp_path, monkeypatch, capsys):
    """Every question has three hard negatives, which count too."""
    monkeypatch.setenv("MIXLM_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "negatives.jsonl"
    negatives = [{"title": "", "text": f"Another text, number {number}."} for number in range(3)]
    examples = read_squad(ENGLISH).examples
    file.write_text("\n".join(json.dumps({"id": each.id, "negatives": negatives}) for each in examples), "utf-8")
    run(train_batch_size=0, num_steps=1, eval_steps=1, hard_negatives=file, num_hard_negatives=3)
    found = re.search(r"--train_batch_size (\d+)\n", capsys.readouterr().out)
    assert 1 < int(found.group(1)) <= len(examples)


def test_a_retriever_is_trained_on_as_it_is(run, tmp_path):
    """A second round, with other negatives, keeps its towers, its norm and its pooler, and no weight is new."""
    first = run(output_dir=tmp_path / "first", two_towers=True, normalize=True, pooler="mean", num_steps=1)
    second = run(output_dir=tmp_path / "second", model_name_or_path=first, num_steps=1)
    config = mixlm.MixLMConfig.from_pretrained(second)
    assert config.two_towers and config.normalize_embeddings and config.pooler == "mean"
    assert weights(second).keys() == weights(first).keys()


def test_skipped_answers_are_listed(run, tmp_path, capsys):
    document = json.loads(ENGLISH.read_text("utf-8"))
    document["data"][0]["paragraphs"][0]["qas"][0]["answers"] = [{"text": "not in there", "answer_start": 0}]
    file = tmp_path / "questions.json"
    file.write_text(json.dumps(document), "utf-8")
    folder = run(train_file=file, num_steps=1)
    assert (
        "answers that are not where the file says, nor once nearby: 1, see skipped_answers.jsonl"
        in capsys.readouterr().out
    )
    (line,) = (folder / "skipped_answers.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["id"] == document["data"][0]["paragraphs"][0]["qas"][0]["id"]


ONE_SOURCE = "give one of --train_file, --dataset_name (questions) and --corpus_path (text)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": None}, "--model_name_or_path is missing"),
        ({"model_name_or_path": "nowhere"}, "nowhere"),
        ({"corpus_path": CORPUS, "train_file": ENGLISH}, ONE_SOURCE),
        ({"train_file": None}, ONE_SOURCE),
        ({"train_file": "nowhere.json"}, "nowhere.json"),
        ({"corpus_path": "nowhere"}, "nowhere"),
        ({"temperature": 0}, "temperature=0.0: must be above 0 and finite"),
        ({"temperature": "inf"}, "temperature=inf: must be above 0 and finite"),
        ({"temperature": "nan"}, "temperature=nan: must be above 0 and finite"),
        ({"max_query_length": 2}, "max_query_length=2: must be at least 3"),
        ({"max_passage_length": 7}, "max_passage_length=7: must be at least 8"),
        ({"num_hard_negatives": 0}, "num_hard_negatives=0: must be at least 1"),
        ({"max_eval_examples": 0}, "max_eval_examples=0: must be at least 1"),
        ({"corpus_path": CORPUS, "eval_split": 0}, "eval_split=0.0: must be between 0 and 1"),
        ({"corpus_path": "lines.dat"}, "--eval_split=0.01: no held-out document has two sentences"),
        ({"remove_query_probability": 1.1}, "remove_query_probability=1.1: must be from 0 to 1"),
        ({"cache_chunk": 0}, "cache_chunk=0: must be at least 1"),
        ({"cache_chunk": 3}, "train_batch_size=8: must be a multiple of cache_chunk=3"),
        ({"cache_chunk": 4, "train_batch_size": 0, "eval_steps": 1}, "must be a multiple of cache_chunk=4"),
        ({"cache_chunk": 4, "gradient_accumulation_steps": 2}, "cache_chunk=4: must be left out with another way"),
        ({"cache_chunk": 4, "effective_batch_size": 8}, "cache_chunk=4: must be left out with another way"),
        ({"corpus_path": CORPUS, "hard_negatives": "x"}, "hard_negatives='x': must be left out with corpus_path"),
        ({"corpus_path": CORPUS, "null_passage": True}, "null_passage=True: must be left out with corpus_path"),
        ({"corpus_path": CORPUS, "max_query_length": 41}, "must be at most max_passage_length=40 with corpus_path"),
        ({"max_passage_length": 49}, "--max_passage_length=49: "),
        ({"max_query_length": 49}, "takes at most 48 tokens (max_position_embeddings)"),
        ({"hard_negatives": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"hard_negatives": "negatives.jsonl"}, "negatives.jsonl: no question to train on is in there"),
        ({"validation_articles": "20:30"}, "no question is in this range"),
        ({"train_batch_size": 200}, "one step needs 200"),
        (
            {"train_file": "last.json", "train_articles": "60:80", "validation_articles": "0:20"},
            "no question to train on is left; is --null_passage missing?",
        ),
        (
            {"train_file": "last.json", "validation_articles": "60:80", "null_passage": True},
            "no question to evaluate on has an answer; choose others",
        ),
    ],
)
def test_what_is_wrong_is_one_line(run, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    Path("negatives.jsonl").write_text('{"id": "of another file", "negatives": [{"text": "x"}]}\n')
    Path("lines.dat").write_text("One sentence.\n\nAnother one.\n\nAnd another.\n")
    document = json.loads(UNANSWERABLE.read_text("utf-8"))
    for paragraph in (paragraph for article in document["data"][60:] for paragraph in article["paragraphs"]):
        paragraph["qas"] = [question for question in paragraph["qas"] if question["is_impossible"]]
    Path("last.json").write_text(json.dumps(document), "utf-8")
    if "corpus_path" in changes:
        changes = {**changes, "cache_dir": tmp_path / "cache"}
    with pytest.raises(UserError) as caught:
        run(**changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "checkpoints").exists()
