"""Questions out of files, names and loaded datasets."""

import json
import math

import pytest
from datasets import Dataset, DatasetDict, load_dataset

from mixlm.errors import UserError
from mixlm.training import fine_tuning as module
from mixlm.training.fine_tuning import FineTuningArguments, read_questions, run_seeds
from mixlm.training.loop import order_has_changed
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


FLAG = "version_2_with_negative"


def write(path, rows) -> list[str]:
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return [str(path)]


def ids(examples) -> list[int]:
    return [int(example.id) for example in examples]


def test_articles_are_chosen_from_a_file_of_each_kind(tmp_path):
    files = {
        "train_file": write(tmp_path / "train.jsonl", ROWS[:12]),
        "validation_file": write(tmp_path / "validation.jsonl", ROWS[12:]),
    }
    found = read_questions(arguments(tmp_path, **files, train_articles="1:3", validation_articles="2:"), FLAG)
    assert (ids(found.training), ids(found.validation)) == ([2, 3, 4, 5], [16, 17, 18, 19])
    assert ids(found.everything) == list(range(20))
    found = read_questions(arguments(tmp_path, **files), FLAG)
    assert (ids(found.training), ids(found.validation)) == (list(range(12)), list(range(12, 20)))


def test_articles_that_are_held_out_are_not_trained_on(tmp_path):
    file = write(tmp_path / "rows.jsonl", ROWS)
    found = read_questions(arguments(tmp_path, train_file=file, validation_articles="2:4"), FLAG)
    assert (ids(found.training), ids(found.validation)) == ([0, 1, 2, 3, *range(8, 20)], [4, 5, 6, 7])


def test_every_seed_holds_out_the_same_articles(tmp_path):
    file = write(tmp_path / "rows.jsonl", ROWS)
    held_out = [
        ids(read_questions(arguments(tmp_path, train_file=file, seed=seed), FLAG).validation) for seed in range(4)
    ]
    assert held_out == [held_out[0]] * 4


def test_what_cannot_be_used_is_left_out_of_both_files(tmp_path):
    nothing = {"text": [], "answer_start": []}
    elsewhere = {"text": ["없는 말"], "answer_start": [0]}
    rows = [
        {**row, "answers": nothing if number % 4 == 0 else elsewhere if number % 4 == 1 else row["answers"]}
        for number, row in enumerate(ROWS)
    ]
    files = {
        "train_file": write(tmp_path / "train.jsonl", rows[:8]),
        "validation_file": write(tmp_path / "validation.jsonl", rows[8:]),
    }
    found = read_questions(arguments(tmp_path, **files), FLAG)
    assert not any(example.is_impossible for example in (*found.training, *found.validation))
    assert any("5 questions have no answer and are left out; --version_2" in note for note in found.notes)
    assert [each.id for each in found.skipped] == ["1", "5", "9", "13", "17"]
    with_flag = read_questions(arguments(tmp_path, **files, version_2_with_negative=True), FLAG)
    assert sum(example.is_impossible for example in with_flag.training) == 2
    assert sum(example.is_impossible for example in with_flag.validation) == 3


@pytest.mark.parametrize(
    ("chosen", "part"), [({"train_articles": "1:"}, "train"), ({"validation_articles": "1:"}, "evaluate")]
)
def test_where_no_question_is_left_the_flag_is_named(tmp_path, chosen, part):
    """Of either file the first article alone has answers."""
    rows = [
        {**row, "answers": {"text": [], "answer_start": []} if number % 10 > 1 else row["answers"]}
        for number, row in enumerate(ROWS)
    ]
    files = {
        "train_file": write(tmp_path / "train.jsonl", rows[:10]),
        "validation_file": write(tmp_path / "validation.jsonl", rows[10:]),
    }
    with pytest.raises(UserError, match=f"no question to {part} on is left; is --version_2_with_negative missing"):
        read_questions(arguments(tmp_path, **files, **chosen), FLAG)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_file": ["a.json"], "dataset_name": "me/data"}, "--train_file and --dataset_name=me/data: give one"),
        ({"tokens_per_step": 512}, "--tokens_per_step=512: must be left out"),
        ({"seeds": [1, 2], "push_to_hub": True, "hub_model_id": "me/model"}, "--push_to_hub=True: must be left out"),
        ({"seeds": []}, r"--seeds=\[\]: must be one or more"),
        ({"seeds": [2**32]}, "--seeds=.*: must be one or more"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        arguments(tmp_path, **fields)


def test_the_order_is_of_the_articles_that_are_trained_on():
    before = {name: None for name in ReadingArguments.ordered_by}
    before |= {"train_batch_size": 4, "gradient_accumulation_steps": 1, "processes": 1, "tokens_per_step": None}
    for name in ("train_articles", "validation_articles", "validation_split"):
        assert order_has_changed(before, {**before, name: "0:3"}, ReadingArguments.ordered_by)


def test_seeds_have_a_mean_and_the_deviation_of_a_sample(tmp_path):
    given = arguments(tmp_path, train_file=["a.json"], seeds=[3, 5, 9], model_name="some")
    given.run_folder.mkdir(parents=True)
    made = []

    def run(own):
        made.append((own.seed, own.run_folder))
        return {"f1": float(own.seed)}

    run_seeds(run, given)
    assert made == [(seed, given.run_folder / f"seed-{seed}") for seed in (3, 5, 9)]
    (found,) = json.loads((given.run_folder / "seeds.json").read_text("utf-8")).values()
    assert found["mean"] == pytest.approx(17 / 3) and found["values"] == [3, 5, 9]
    assert found["deviation"] == pytest.approx(math.sqrt(sum((value - 17 / 3) ** 2 for value in (3, 5, 9)) / 2))


def test_seeds_share_the_minutes(tmp_path, monkeypatch):
    """Of 50 minutes, the second run of 40 has 10 left, and the third none."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    given = arguments(tmp_path, train_file=["a.json"], seeds=[1, 2, 3], max_minutes=50)
    given.run_folder.mkdir(parents=True)
    minutes = []

    def run(own):
        minutes.append(own.max_minutes)
        now[0] += 40 * 60
        return {"f1": 0.0}

    run_seeds(run, given)
    assert minutes == [50, 10, 0]


def test_the_record_names_the_files_of_each_kind(tmp_path):
    files = {
        "train_file": write(tmp_path / "train.jsonl", ROWS[:10]),
        "validation_file": write(tmp_path / "validation.jsonl", ROWS[10:]),
    }
    sources = arguments(tmp_path, **files).data_sources()
    assert {name: [str(file) for file in found] for name, found in sources.items()} == files
