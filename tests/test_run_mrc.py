"""run_mrc.py from the arguments to the finished reader, and what a user can get wrong."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

import mixlm
from mixlm.data.squad import read_squad
from mixlm.errors import UserError
from mixlm.evaluation.reading_report import load_judged, scores_of, telling_aspects
from mixlm.reader import Decoding, MixLMReader
from mixlm.tokenization import train_tokenizer
from mixlm.training.reading import ReadingArguments
from mixlm.training.report import read_curves

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))

import run_mrc

CITIES = ("서울", "부산", "대구", "인천", "광주", "대전", "울산", "세종", "수원", "전주", "제주", "강릉")
ENGLISH = REPOSITORY / "mixlm" / "sample" / "en_questions.json"
FAMILIES = {
    "mixlm": (mixlm.MixLMConfig, {"n_experts": 2, "num_heads": 2, "kernel_size": 5, "ff_dim": 64}),
    "switch": (mixlm.MixLMSwitchConfig, {"n_experts": 2, "num_heads": 2, "ff_dim": 32}),
}
PRETRAINED = {
    ("mixlm", "sop"): mixlm.MixLMForPreTraining,
    ("mixlm", "mlm"): mixlm.MixLMForMaskedLM,
    ("mixlm", "retrieval"): mixlm.MixLMForRetrieval,
    ("mixlm", "ict"): mixlm.MixLMForPreTraining,
    ("switch", "sop"): mixlm.MixLMSwitchForPreTraining,
    ("switch", "mlm"): mixlm.MixLMSwitchForMaskedLM,
    ("switch", "retrieval"): mixlm.MixLMSwitchForRetrieval,
    ("switch", "ict"): mixlm.MixLMSwitchForPreTraining,
}
# What leaves a run nothing to train on, and nothing that says how.
UNTRAINED = {"train_file": None, "validation_articles": None, "num_steps": None}


def article(number: int, version_2: bool = False) -> dict:
    """Four questions whose answers follow the same words."""
    paragraphs = []
    for first in range(2):
        city, other = CITIES[(number + first) % len(CITIES)], CITIES[(number + first + 5) % len(CITIES)]
        context = f"그는 {city}에서 태어났다. 나중에 {other}에서 살았다."
        questions = [("태어난 곳은?", city), ("살던 곳은?", other)]
        qas = [
            {
                "id": f"{number}-{first}-{index}",
                "question": question,
                "answers": [{"text": answer, "answer_start": context.index(answer)}],
            }
            for index, (question, answer) in enumerate(questions)
        ]
        if version_2:
            qas.append({"id": f"{number}-{first}-x", "question": "나이는?", "answers": [], "is_impossible": True})
        paragraphs.append({"context": context, "qas": qas})
    return {"title": f"글 {number}", "paragraphs": paragraphs}


def write(file: Path, articles: list[dict]) -> str:
    file.write_text(json.dumps({"version": "x", "data": articles}, ensure_ascii=False), "utf-8")
    return str(file)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A tokenizer, data, and a pretrained model of each family and head."""
    folder = tmp_path_factory.mktemp("prepared")
    write(folder / "v1.json", [article(number) for number in range(12)])
    write(folder / "v2.json", [article(number, version_2=True) for number in range(12)])
    texts = [paragraph["context"] for number in range(12) for paragraph in article(number)["paragraphs"]]
    tokenizer = train_tokenizer([*texts * 2, "태어난 곳은? 살던 곳은? 나이는?"], 500, show_progress=False)
    for (family, head), model_class in PRETRAINED.items():
        config_class, fields = FAMILIES[family]
        common = {"hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64, "dropout_prob": 0.0}
        objective = {"pretraining_objective": head} if head in ("sop", "ict") else {}
        torch.manual_seed(0)
        model_class(config_class(vocab_size=len(tokenizer), **common, **fields, **objective)).save_pretrained(
            folder / f"{family}-{head}"
        )
        tokenizer.save_pretrained(folder / f"{family}-{head}")
    return folder


@pytest.fixture
def run(prepared, tmp_path, monkeypatch):
    """(changes) -> the folder of a short run of the script in this process; None leaves an argument out."""

    def run_main(**changes) -> Path:
        defaults = {
            "model_name_or_path": prepared / "mixlm-sop",
            "train_file": prepared / "v1.json",
            "validation_articles": "10:12",
            "output_dir": tmp_path / "out",
            "max_seq_length": 32,
            "max_query_length": 8,
            "doc_stride": 8,
            "train_batch_size": 8,
            "num_steps": 2,
            "logging_steps": 1,
            "num_workers": 0,
        }
        arguments = {name: value for name, value in {**defaults, **changes}.items() if value is not None}
        flags = [
            [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
            for name, value in arguments.items()
        ]
        monkeypatch.setattr(sys, "argv", ["run_mrc.py", *(part for flag in flags for part in flag)])
        run_mrc.main.__wrapped__()
        return Path(arguments["output_dir"])

    return run_main


def results(folder: Path) -> dict[str, float]:
    return json.loads((folder / "eval_results.json").read_text("utf-8"))


def predictions(folder: Path) -> dict[str, str]:
    return json.loads((folder / "predictions.json").read_text("utf-8"))


def test_it_learns_to_read_and_says_how_well(run, tmp_path, capsys):
    """One question about each text: where in it the answer stands."""
    articles = [article(number) for number in range(12)]
    for paragraph in (paragraph for each in articles for paragraph in each["paragraphs"]):
        del paragraph["qas"][1:]
    folder = run(train_file=write(tmp_path / "data.json", articles), num_steps=60, learning_rate=5e-3, eval_steps=20)
    expected = {
        paragraph["qas"][0]["id"]: paragraph["qas"][0]["answers"][0]["text"]
        for each in articles[10:]
        for paragraph in each["paragraphs"]
    }
    found = predictions(folder)
    assert found.keys() == expected.keys()
    right = sum(found[id_] == text for id_, text in expected.items()) / len(expected)
    assert results(folder)["eval/exact_match"] == pytest.approx(100 * right) and right >= 0.75
    said = capsys.readouterr().out
    assert said.count("has no head for question answering: a new one is trained") == 1
    assert {"eval/f1", "train/reading_loss"} <= read_curves(folder).keys()


def test_the_folder_is_that_of_the_best_checkpoint(run, monkeypatch):
    """Not of the last: the scores of three evaluations while training, and of the one afterwards."""
    scores = iter([50.0, 90.0, 10.0, 90.0])
    monkeypatch.setattr(run_mrc, "reading_metrics", lambda *arguments: {"f1": next(scores)})
    folder = run(num_steps=6, eval_steps=2, learning_rate=5e-3)
    assert results(folder)["eval/f1"] == 90.0 and next(scores, None) is None
    weights = {
        step: load_file(folder / "checkpoints" / f"step-{step:08d}" / "model" / "model.safetensors") for step in (4, 6)
    }
    final = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights[4][name], tensor) for name, tensor in final.items())
    assert not all(torch.equal(weights[6][name], tensor) for name, tensor in final.items())


def test_a_longer_run_remembers_what_was_best(run, tmp_path, monkeypatch):
    """Of the first part the last evaluation comes after its last checkpoint: a longer run makes it again."""
    given = {"eval_steps": 2, "learning_rate": 5e-3, "scheduler_num_steps": 6, "output_dir": tmp_path / "out"}
    for scores, changes in (
        ([50.0, 90.0, 90.0], {"num_steps": 4}),
        ([90.0, 10.0, 90.0], {"num_steps": 6, "resume": "auto"}),
    ):
        following = iter(scores)
        monkeypatch.setattr(run_mrc, "reading_metrics", lambda *arguments, of=following: {"f1": next(of)})
        folder = run(**given, **changes)
        assert next(following, None) is None
    kept = load_file(folder / "checkpoints" / "step-00000004" / "model" / "model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in load_file(folder / "model.safetensors").items())


def test_what_was_best_by_another_measure_is_forgotten(run, prepared, tmp_path, capsys):
    folder = tmp_path / "out"
    run(output_dir=folder, train_file=prepared / "v2.json", num_steps=2, scheduler_num_steps=4, eval_steps=1)
    changed = {"version_2_with_negative": True, "resume": "auto"}
    run(output_dir=folder, train_file=prepared / "v2.json", num_steps=4, eval_steps=1, **changed)
    assert "version_2_with_negative has changed: earlier evaluations say nothing" in capsys.readouterr().out
    assert "eval/best_f1" in results(folder)


def test_killed_before_its_first_checkpoint_a_run_goes_on(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "skipped_answers.jsonl").write_text("")
    run(resume="auto")


def test_the_saved_model_is_one_for_transformers(run, prepared):
    folder = run(num_steps=1)
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    assert type(model).__name__ == "MixLMForQuestionAnswering"
    # Its logits are those that the answers were read from.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (paragraph,) = [each for each in article(10)["paragraphs"] if each["qas"][0]["id"] == "10-0-0"]
    with torch.no_grad():
        outputs = model(**tokenizer(paragraph["qas"][0]["question"], paragraph["context"], return_tensors="pt"))
    best = json.loads((folder / "nbest_predictions.json").read_text("utf-8"))["10-0-0"][0]
    for name in ("start_logit", "end_logit"):
        logits = getattr(outputs, f"{name}s")[0]
        assert (logits - best[name]).abs().min() < 1e-5, name
    for name in (
        "predictions.json",
        "nbest_predictions.json",
        "reader.json",
        "tokenizer.json",
        "skipped_answers.jsonl",
    ):
        assert (folder / name).is_file(), name


@pytest.mark.parametrize(("family", "head"), PRETRAINED)
def test_it_begins_with_any_head_of_either_family(run, prepared, family, head):
    """What is below the head is the pretrained model's."""
    source = prepared / f"{family}-{head}"
    folder = run(model_name_or_path=source, num_steps=1, learning_rate=1e-9)
    before, after = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in after.items() if not name.startswith("qa_outputs.")}
    assert kept and all(torch.allclose(tensor, before[name], atol=1e-7) for name, tensor in kept.items())


def test_it_trains_models_of_transformers_too(run, prepared, tmp_path):
    """For comparisons: the script knows nothing that is mixlm's own."""
    vocabulary = mixlm.MixLMConfig.from_pretrained(prepared / "mixlm-sop").vocab_size
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=vocabulary, **shape)).save_pretrained(tmp_path / "bert")
    folder = run(model_name_or_path=tmp_path / "bert", tokenizer=prepared / "mixlm-sop")
    assert type(AutoModelForQuestionAnswering.from_pretrained(folder)).__name__ == "BertForQuestionAnswering"


def test_an_interrupted_run_goes_on_and_is_the_same(run, tmp_path):
    """Where it ends it is evaluated, which can be best: so the whole one is evaluated there too."""
    whole = run(output_dir=tmp_path / "whole", num_steps=4, eval_steps=2)
    run(output_dir=tmp_path / "parts", num_steps=2, eval_steps=2, scheduler_num_steps=4, save_steps=1)
    parts = run(output_dir=tmp_path / "parts", num_steps=4, eval_steps=2, resume="auto")
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert predictions(whole) == predictions(parts)


def test_unanswerable_questions_need_their_flag_and_then_have_a_threshold(run, prepared, capsys):
    run(train_file=prepared / "v2.json")
    assert (
        "24 questions have no answer and are left out; --version_2_with_negative uses them" in capsys.readouterr().out
    )


def test_with_the_flag_a_threshold_is_tuned(run, prepared):
    folder = run(train_file=prepared / "v2.json", version_2_with_negative=True, num_steps=20, learning_rate=5e-3)
    found = results(folder)
    decoding = Decoding.load(folder)
    assert decoding.unanswerable and decoding.null_threshold == pytest.approx(found["eval/best_f1_thresh"])
    assert found["eval/f1"] == pytest.approx(found["eval/best_f1"])  # that is what the threshold is for
    assert found["eval/NoAns_total"] == 4 and found["eval/HasAns_total"] == 8
    odds = json.loads((folder / "null_odds.json").read_text("utf-8"))
    answered = predictions(folder)
    assert odds.keys() == answered.keys()
    assert all((answer == "") == (odds[id_] > decoding.null_threshold) for id_, answer in answered.items())


def test_skipped_answers_are_no_questions_to_train_on(run, tmp_path, capsys):
    articles = [article(number) for number in range(12)]
    articles[0]["paragraphs"][0]["qas"][0]["answers"][0]["text"] = "없는 곳"
    without_tokens = articles[1]["paragraphs"][0]
    without_tokens["qas"][0]["answers"] = [{"text": "\x00", "answer_start": len(without_tokens["context"])}]
    without_tokens["context"] += "\x00"
    folder = run(train_file=write(tmp_path / "two_wrong.json", articles))
    said = capsys.readouterr().out
    assert "38 questions in 38 windows to train on for 2 steps, 8 in 8 to evaluate on" in said
    assert "answers that are not where the file says, nor once nearby: 1, see skipped_answers.jsonl" in said
    assert "questions that cannot be learned from: 1, see skipped_answers.jsonl" in said
    skipped = (folder / "skipped_answers.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["id"] for line in skipped] == ["0-0-0", "1-0-0"]


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        ("v1", {}),
        ("v1", {"metric": "squad_v1"}),
        ("v2", {"version_2_with_negative": True}),
    ],
)
def test_what_is_said_about_each_question_adds_up_to_the_results(run, prepared, data, changes):
    folder = run(train_file=prepared / f"{data}.json", num_steps=20, learning_rate=5e-3, **changes)
    judged = load_judged(folder / "questions.jsonl")
    assert {each.id: each.prediction for each in judged} == predictions(folder)
    found, scores = results(folder), scores_of(judged)
    assert scores.questions == found["eval/total"] and 0 < scores.f1 < 100
    assert (scores.exact_match, scores.f1) == pytest.approx((found["eval/exact_match"], found["eval/f1"]))
    assert all((each.error == "correct") == (each.exact_match == 1) for each in judged)
    assert all(each.windows == 1 for each in judged)
    # A name and its particle are different tokens.
    assert scores.expressible == 100
    if "version_2_with_negative" in changes:
        (parts,) = [parts for aspect, parts in telling_aspects(judged) if aspect.title == "answerability"]
        for name, part in parts.items():
            assert (part.questions, part.f1) == (found[f"eval/{name}_total"], pytest.approx(found[f"eval/{name}_f1"]))


def test_an_answer_inside_a_token_cannot_be_expressed(run, tmp_path):
    articles = [article(number) for number in range(12)]
    for question in (question for paragraph in articles[11]["paragraphs"] for question in paragraph["qas"]):
        (answer,) = question["answers"]
        answer |= {"text": answer["text"][1:], "answer_start": answer["answer_start"] + 1}
    folder = run(train_file=write(tmp_path / "data.json", articles))
    assert [each.expressible for each in load_judged(folder / "questions.jsonl")] == [True] * 4 + [False] * 4


def test_particles_are_dropped_if_that_is_better(run, tmp_path, capsys):
    """What is learned ends in a particle; the references of an evaluation do not, and those of another do.

    Its questions are as long as those: where an answer stands is all that so small a model learns.
    """
    files = {}
    texts = {"training": ("태어난 곳은?", "에서"), "bare": ("태어난 곳은!", ""), "whole": ("태어난 곳은!", "에서")}
    for name, (question, ending) in texts.items():
        articles = [article(number) for number in range(12)]
        for paragraph in (paragraph for each in articles for paragraph in each["paragraphs"]):
            del paragraph["qas"][1:]
            paragraph["qas"][0]["question"] = question
            paragraph["qas"][0]["answers"][0]["text"] += ending
        files[name] = write(tmp_path / f"{name}.json", articles)
    given = {"train_file": files["training"], "num_steps": 60, "learning_rate": 5e-3, "tune_decoding": True}
    for references, choice in (("bare", "dropped"), ("whole", "kept")):
        folder = run(**given, validation_file=files[references], resume="auto")
        found = results(folder)
        f1 = {name: found[f"eval/particles_{name}_f1"] for name in ("kept", "dropped")}
        assert found["eval/f1"] == f1[choice] == max(f1.values()) > min(f1.values())
        assert found["eval/exact_match"] == found[f"eval/particles_{choice}_exact_match"]
        assert Decoding.load(folder).korean_particles == (choice == "dropped")
        assert any(answer.endswith("에서") for answer in predictions(folder).values()) == (choice == "kept")
        assert f"particles are {choice}, which was chosen on these very questions" in capsys.readouterr().out


def test_several_seeds_have_a_mean(run, capsys):
    folder = run(seeds=[1, 2], num_steps=2)
    summary = json.loads((folder / "seeds.json").read_text("utf-8"))
    values = [results(folder / f"seed-{seed}")["eval/f1"] for seed in (1, 2)]
    assert summary["f1"]["values"] == values and summary["f1"]["mean"] == pytest.approx(sum(values) / 2)
    assert "±" in capsys.readouterr().out


def test_seeds_of_a_named_run_are_in_its_folder(run, tmp_path):
    run(seeds=[3], num_steps=1, model_name="reader", do_train=True)  # without do_eval the best evaluation counts
    folder = tmp_path / "out" / "reader"
    assert (folder / "seed-3" / "config.json").is_file()
    best = max(value for _, value in read_curves(folder / "seed-3")["eval/f1"])
    assert json.loads((folder / "seeds.json").read_text("utf-8"))["f1"]["mean"] == pytest.approx(best, abs=1e-4)


def test_seeds_on_several_processes(prepared, tmp_path):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "run_mrc.py"),
        *("--model_name_or_path", str(prepared / "mixlm-sop"), "--train_file", str(prepared / "v1.json")),
        *("--output_dir", str(tmp_path / "out"), "--max_seq_length", "32", "--max_query_length", "8"),
        *("--doc_stride", "8", "--train_batch_size", "4", "--num_steps", "1", "--num_workers", "0"),
        *("--seeds", "1", "2"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("±") == len(json.loads((tmp_path / "out" / "seeds.json").read_text("utf-8")))
    # What two processes have read together, one reads alone.
    reader = MixLMReader.from_pretrained(tmp_path / "out" / "seed-2")
    answers = predictions(tmp_path / "out" / "seed-2")
    examples = [each for each in read_squad(prepared / "v1.json").examples if each.id in answers]
    assert len(examples) == len(answers) > 2
    assert answers == {each.id: reader.answer(each.question, each.context).text for each in examples}


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("mixlm-sop", {}, "is not trained to answer questions"),
        ("reader", {"version_2_with_negative": True}, "was trained otherwise; leave out --version_2_with_negative"),
    ],
)
def test_what_cannot_answer_is_refused(run, prepared, tmp_path, model, changes, message):
    reader = run(num_steps=1, do_train=True) if model == "reader" else prepared / model
    answering = {**UNTRAINED, "validation_file": prepared / "v1.json"}
    with pytest.raises(UserError, match=message):
        run(model_name_or_path=reader, output_dir=tmp_path / "answers", **answering, **changes)


def test_a_model_without_token_types_is_refused(run, prepared, tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    RobertaForMaskedLM(RobertaConfig(vocab_size=600, type_vocab_size=1, **shape)).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="has no token types"):
        run(model_name_or_path=tmp_path / "model", tokenizer=prepared / "mixlm-sop")


def test_questions_are_answered_without_training(run, prepared, tmp_path, capsys):
    folder = run(num_steps=2)
    assert f"answers are in {folder}\n" in capsys.readouterr().out
    asked = {"model_name_or_path": folder, "output_dir": tmp_path / "answers", **UNTRAINED}
    again = run(**asked, predict_file=prepared / "v1.json")
    assert f"answers are in {again / 'predict'}\n" in capsys.readouterr().out
    asked = json.loads((again / "predict" / "predictions.json").read_text("utf-8"))
    assert len(asked) == 48 and asked.items() >= predictions(folder).items()


def test_an_evaluation_does_not_replace_the_results_of_the_training(run, prepared):
    """The model card would say that they are of the training's questions."""
    reader = run(num_steps=1, do_train=True)
    before = results(reader)
    answering = {**UNTRAINED, "model_name_or_path": reader, "output_dir": reader}
    with pytest.raises(UserError, match=f"^{reader}: a model is there.*give another --output_dir$"):
        run(**answering, validation_file=prepared / "v1.json", do_eval=True)
    assert results(reader) == before


def test_a_checkpoint_answers_as_it_was_trained_to(run):
    folder = run(num_steps=2, save_steps=1)
    (first, *_) = sorted((folder / "checkpoints").iterdir())
    assert MixLMReader.from_pretrained(first / "model").decoding == Decoding.load(folder)


def test_an_evaluation_says_what_it_cannot_use_and_reads_as_it_is_told(run, prepared, tmp_path, capsys):
    reader = run(num_steps=1, do_train=True)
    articles = [article(number) for number in range(2)]
    articles[0]["paragraphs"][0]["qas"][0]["answers"][0]["text"] = "없는 곳"
    articles[1]["paragraphs"][0]["qas"][0]["question"] = "태어난 곳은? " * 8
    answering = {**UNTRAINED, "model_name_or_path": reader}
    data = write(tmp_path / "data.json", articles)
    folder = run(**answering, output_dir=tmp_path / "answers", validation_file=data, n_best_size=2)
    said = capsys.readouterr().out
    assert "answers that are not where the file says, nor once nearby: 1, see skipped_answers.jsonl" in said
    assert "questions cut to max_query_length: 1" in said
    (skipped,) = (folder / "skipped_answers.jsonl").read_text("utf-8").splitlines()
    assert json.loads(skipped)["id"] == "0-0-0"
    best = json.loads((folder / "nbest_predictions.json").read_text("utf-8"))
    assert {len(candidates) for candidates in best.values()} == {2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": None}, "--model_name_or_path is missing"),
        ({"model_name_or_path": "nowhere"}, "nowhere"),
        ({"train_file": None, "validation_articles": None}, "no questions: give --train_file"),
        ({"train_file": "nowhere.json"}, "nowhere.json"),
        ({"train_articles": "0:11"}, "article 10 is in both"),
        ({"validation_articles": "20:30"}, "no question is in this range"),
        ({"doc_stride": 30}, "doc_stride 30"),
        ({"seeds": [-1]}, "seeds=[-1]: must be one or more different numbers"),
        ({"seeds": [1], "do_eval": True}, "seeds=[1]: must be left out where nothing is trained"),
        ({"do_eval": True}, "num_steps=2: must be left out where nothing is trained"),
        ({"do_eval": True, "num_steps": None, "learning_rate": 1e-4}, "learning_rate=0.0001: must be left out where"),
        ({"do_eval": True, "num_steps": None, "bf16": True}, "bf16=True: must be left out where nothing is trained"),
        (
            {"train_file": None, "validation_articles": None, "validation_file": ENGLISH, "do_train": True},
            "--do_train: nothing to train on; give --train_file or --dataset_name",
        ),
        ({"seeds": [1, 1]}, "seeds=[1, 1]: must be one or more different numbers"),
        ({"seeds": [1], "resume": "out/checkpoints/step-00000001"}, "must be auto or never with seeds"),
        ({"n_best_size": 0}, "n_best_size=0: must be at least 1"),
        ({"train_batch_size": 0, "num_steps": 5}, "train_batch_size=0: must be above 0, unless"),
        ({"max_seq_length": 65, "max_query_length": 8}, "max_seq_length"),
        ({"validation_articles": None, "validation_split": 1.0}, "validation_split=1.0: must be between 0 and 1"),
        ({"num_train_epochs": math.inf}, "num_train_epochs=inf: must be above 0 and at most a million"),
        ({"train_batch_size": 0, "num_steps": None}, "train_batch_size=0: must be above 0, unless"),
        ({"do_predict": True}, "do_predict=True: must be left out without predict_file"),
        ({"tune_decoding": True, "korean_particles": True}, "tune_decoding=True: must be left out, unless"),
        ({"tune_decoding": True, "do_eval": True}, "tune_decoding=True: must be left out, unless"),
        (
            {"tune_decoding": True, "train_file": ENGLISH, "validation_articles": "0:1"},
            "no text to evaluate on is Korean",
        ),
    ],
)
def test_what_is_wrong_is_one_line(run, changes, message, tmp_path):
    with pytest.raises(UserError) as caught:
        run(**changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("given", "processes", "steps", "warmup", "evaluations"),
    [
        ({}, 1, 30, 3, 10),  # 80 windows, 8 rows
        ({"gradient_accumulation_steps": 2}, 2, 6, 0, 2),
        ({"num_steps": 7}, 1, 7, 0, 10),
        ({"num_steps": 40, "warmup_steps": 9, "eval_steps": 5}, 1, 40, 9, 5),
        ({"train_batch_size": 0, "effective_batch_size": 16}, 2, 15, 1, 5),
        ({"num_train_epochs": 0.5}, 1, 5, 0, 10),
        ({"warmup_steps": 0}, 1, 30, 0, 10),
        ({"max_steps_per_epoch": 4}, 1, 12, 1, 4),
    ],
)
def test_the_schedule_follows_from_the_data(given, processes, steps, warmup, evaluations):
    fields = {"model_name_or_path": "m", "train_file": ["f"], "train_batch_size": 8, **given}
    arguments = ReadingArguments(**fields)
    arguments.fit_steps(80, processes)
    found = arguments.num_steps, arguments.warmup_steps, arguments.eval_steps, arguments.scheduler_num_steps
    assert found == (steps, warmup, evaluations, steps)


def test_what_is_evaluated_on_is_not_trained_on(run, tmp_path, capsys):
    articles = [article(number) for number in range(4)]
    given = {"train_file": write(tmp_path / "train.json", articles), "num_steps": 1}
    given |= {"train_articles": None, "validation_articles": None}
    with pytest.raises(UserError, match="4 of the questions to evaluate on, such as '3-0-0', are trained on"):
        run(**given, validation_file=write(tmp_path / "same.json", articles[3:]))
    for paragraph in articles[3]["paragraphs"]:
        for each in paragraph["qas"]:
            each["question"] += "?"
    run(**given, validation_file=write(tmp_path / "other.json", articles[3:]))
    note = "4 questions to evaluate on, such as '3-0-0', are about texts that are trained on, with other questions"
    assert note in capsys.readouterr().out
