"""Questions out of files, names and loaded datasets."""

import json

import pytest
from datasets import Dataset, DatasetDict, load_dataset

from mixlm.errors import UserError
from mixlm.training.fine_tuning import FineTuningArguments, read_questions
from mixlm.training.reading import ReadingArguments
from mixlm.training.record import read_record, record_run

ROWS = [
    {
        "id": str(number),
        "title": f"article {number // 2}",
        "context": f"제주도는 섬이다. {number}",
        "question": "무엇인가?",
        "answers": {"text": ["섬"], "answer_start": [5]},
    }
    for number in range(20)
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def arguments(tmp_path, **fields) -> FineTuningArguments:
    return ReadingArguments(output_dir=str(tmp_path / "out"), model_name_or_path="me/base", **fields)


def test_every_source_gives_the_same_questions(tmp_path):
    file = str(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), "utf-8")
    expected = read_questions(arguments(tmp_path, train_file=[file]), "version_2_with_negative")
    assert len(expected.training) == 18 and len(expected.validation) == 2
    named = arguments(tmp_path, dataset_name=file)
    assert read_questions(named, "version_2_with_negative") == expected
    for loaded in (
        Dataset.from_list(ROWS),
        DatasetDict({"train": Dataset.from_list(ROWS)}),
        load_dataset("json", data_files=file, streaming=True),
        load_dataset("json", data_files=file, split="train", streaming=True),
    ):
        assert read_questions(named, "version_2_with_negative", dataset=loaded) == expected


def test_a_dataset_can_have_its_own_validation_split(tmp_path):
    splits = DatasetDict({"train": Dataset.from_list(ROWS[:16]), "validation": Dataset.from_list(ROWS[16:])})
    found = read_questions(arguments(tmp_path, dataset_name="mine"), "version_2_with_negative", dataset=splits)
    assert [len(found.training), len(found.validation)] == [16, 4]


def test_a_configuration_is_that_of_a_dataset(tmp_path):
    with pytest.raises(UserError, match="--dataset_config_name='ko': must be left out without dataset_name"):
        arguments(tmp_path, train_file=["a.json"], dataset_config_name="ko")


@pytest.mark.parametrize("streaming", [False, True])
def test_the_record_names_what_a_dataset_is_known_by(tmp_path, monkeypatch, streaming):
    """Without reading a stream to its end."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), "utf-8")
    loaded = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), streaming=streaming)
    monkeypatch.setattr("mixlm.training.record.load_splits", lambda *_: dict(loaded))
    given = arguments(tmp_path, dataset_name="me/data")
    (tmp_path / "out").mkdir()
    record_run(given, given.to_dict(), first_step=0)
    (entry,) = read_record(tmp_path / "out")["data"]
    assert entry["name"] == "me/data" and list(entry["fingerprints"]) == ["train"] and entry["fingerprints"]["train"]
