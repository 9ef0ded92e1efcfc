"""The model card says what the run's folder says, and leaves alone what a person has written."""

import ast
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from remote_models import tiny_model, tiny_tokenizer
from torch.utils.tensorboard import SummaryWriter

import mixlm
from mixlm.errors import UserError
from mixlm.training.card import is_generated, write_card
from mixlm.training.run import remove_earlier_run

NAME = "me/my-model"
RESULTS = {"eval/exact_match": 50.0, "eval/f1": 61.25, "eval/total": 16, "eval/best_f1_thresh": -1.5, "eval/x": None}
RECORD = {
    "commands": [
        {"command": "python run_mrc.py --train_file dev.json", "first_step": 0},
        {"command": "python run_mrc.py --resume auto", "first_step": 40},
    ],
    "arguments": {"validation_articles": "3:5", "num_steps": 60, "processes": 2, "max_seq_length": 24},
    "base_model": {"name": "base", "hub_model_id": "me/base"},
    "languages": ["ko"],
    "data": [
        {"argument": "train_file", "name": "dev.json", "files": [{"name": "dev.json", "bytes": 7, "blake2b": "abc1"}]},
        {"argument": "dataset_name", "name": "me/data", "fingerprints": {"train": "f00"}},
    ],
    "device": "CPU",
    "versions": {"mixlm": "0.1.0", "torch": "2.13.0"},
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """As a run leaves it, in short."""
    folder = tmp_path / "run"
    tiny_model(mixlm.MixLMForQuestionAnswering).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "eval_results.json").write_text(json.dumps(RESULTS))
    (folder / "run.json").write_text(json.dumps(RECORD))
    return folder


def card(folder: Path, **options) -> str:
    write_card(folder, NAME, options.pop("license", None), **options)
    return (folder / "README.md").read_text("utf-8")


def test_the_hub_reads_the_metadata(folder):
    found = ModelCard(card(folder)).data
    assert (found.language, found.license, found.library_name) == (["ko"], "apache-2.0", "transformers")
    assert (found.pipeline_tag, found.tags, found.base_model) == ("question-answering", ["mixlm"], "me/base")
    assert found.datasets == ["me/data"] and found.model_name == "my-model"
    results = {each.metric_type: each.metric_value for each in found.eval_results}
    assert results == {"exact_match": 50.0, "f1": 61.25}  # counts and thresholds measure no quality
    assert {each.dataset_name for each in found.eval_results} == {"articles 3:5 of dev.json"}
    assert {each.task_type for each in found.eval_results} == {"question-answering"}


def test_a_person_reads_the_rest(folder):
    text = card(folder)
    parameters = sum(each.numel() for each in mixlm.MixLMForQuestionAnswering.from_pretrained(folder).parameters())
    for expected in (
        f"It has {parameters:,} parameters",
        "was fine-tuned from me/base",
        "| f1 | 61.2500 |",
        "| total | 16 |",
        "  * dev.json, 7 bytes, `abc1`",
        "`--dataset_name` me/data, fingerprints of `datasets`: train `f00`",
        "| hidden_size | 16 |",
        "$ python run_mrc.py --train_file dev.json\n$ python run_mrc.py --resume auto  # went on after step 40\n",
        "On 2 processes (CPU)",
        "mixlm 0.1.0, torch 2.13.0.",
        '"num_steps": 60',
        "## Intended use and limits",
        "max_length=24",
    ):
        assert expected in text
    assert not (folder / "curves.png").exists() and "curves.png" not in text


@pytest.mark.parametrize("name", ["PreTraining", "MaskedLM", "QuestionAnswering", "Retrieval", "Model"])
@pytest.mark.parametrize("family", ["MixLM", "MixLMSwitch"])
def test_a_model_without_a_run_has_a_card_that_claims_nothing_of_one(tmp_path, family, name):
    model_class = getattr(mixlm, family + ("Model" if name == "Model" else f"For{name}"))
    tiny_model(model_class).save_pretrained(tmp_path)
    text = card(tmp_path, license="mit")
    found = ModelCard(text).data
    tags = {"PreTraining": "fill-mask", "MaskedLM": "fill-mask", "QuestionAnswering": "question-answering"}
    assert found.pipeline_tag == tags.get(name, "feature-extraction") and found.license == "mit"
    assert found.language is None and found.eval_results is None and found.base_model is None
    assert not re.search("^## (Results|Data|Training)", text, flags=re.MULTILINE)
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2 and all(NAME in block and ast.parse(block) for block in blocks)
    assert not re.search("NAME|QUESTION|TEXT|LENGTH|MASKED", "".join(blocks))


def test_curves_are_drawn(folder):
    pytest.importorskip("matplotlib")
    with SummaryWriter(folder / "tensorboard") as writer:
        for step in (1, 2):
            writer.add_scalar("train/loss", 1.0 / step, step)
    assert "![Curves of the training](curves.png)" in card(folder)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_a_card_without_curves(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with SummaryWriter(folder / "tensorboard") as writer:
        writer.add_scalar("train/loss", 1.0, 1)
    (note,) = write_card(folder, NAME, None)
    assert note.startswith("the card is without curves: drawing needs matplotlib")
    assert "curves.png" not in (folder / "README.md").read_text("utf-8")


def test_a_card_of_its_own_is_written_anew(folder):
    first = card(folder)
    assert is_generated(first)
    (folder / "eval_results.json").write_text(json.dumps({"eval/f1": 99.5}))
    second = card(folder)
    assert "99.5000" in second and "61.2500" not in second and is_generated(second)
    assert card(folder) == second  # nothing in it changes by itself


@pytest.mark.parametrize("change", ["a word", "front matter", "all"])
def test_what_a_person_has_written_stays(folder, change):
    text = {
        "a word": lambda: card(folder).replace("## Data", "## 제가 쓴 자료"),
        "front matter": lambda: card(folder).replace("apache-2.0", "cc-by-4.0"),
        "all": lambda: "# 제 모델\n",
    }[change]()
    (folder / "README.md").write_text(text, "utf-8")
    (note,) = write_card(folder, NAME, None)
    assert "README.md was written by hand and is pushed as it is" in note
    assert (folder / "README.md").read_text("utf-8") == text
    remove_earlier_run(folder)  # nor does a new run in its place delete it
    assert (folder / "README.md").read_text("utf-8") == text


def test_a_new_run_deletes_the_card_of_the_earlier_one(folder):
    card(folder)
    remove_earlier_run(folder)
    assert not (folder / "README.md").exists() and not (folder / "run.json").exists()


def test_a_model_in_the_middle_of_its_training_says_so(folder):
    (folder / "eval_results.json").unlink()
    assert "**This is the model after step 40 of 60**" in card(folder, step=40)


@pytest.mark.parametrize(
    ("file", "content"), [("run.json", "{}"), ("eval_results.json", "[1]"), ("README.md", "\xff")]
)
def test_a_damaged_file_is_one_line(folder, file, content):
    (folder / file).write_text(content, "latin-1")
    with pytest.raises(UserError, match=file):
        write_card(folder, NAME, None)


def test_a_retriever_of_a_dataset_was_judged_by_a_part_of_it(folder):
    """`--eval_split` is of documents, which it had none of."""
    record = json.loads((folder / "run.json").read_text("utf-8"))
    record["data"] = [{"argument": "dataset_name", "name": "KorQuAD/squad_kor_v1", "fingerprints": {"train": "5eed"}}]
    record["arguments"] = {"processes": 1, "eval_split": 0.01, "validation_articles": None}
    (folder / "run.json").write_text(json.dumps(record))
    assert "On held-out part of KorQuAD/squad_kor_v1:" in card(folder)
