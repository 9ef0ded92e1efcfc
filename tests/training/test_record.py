"""run.json: what a run was made with, whatever happens to it."""

import hashlib
import json
import sys

import pytest
from small_runs import build_arguments, run_small

import mixlm
from mixlm.errors import UserError
from mixlm.training.fine_tuning import FineTuningArguments
from mixlm.training.record import read_record, record_run


@pytest.fixture
def typed(monkeypatch):
    """Set the command line."""
    return lambda *words: monkeypatch.setattr(sys, "argv", ["run_x.py", *words])


def test_a_run_that_goes_on_keeps_the_commands_that_lead_to_it(tmp_path, typed):
    typed("--learning_rate", "3e-3")
    run_small(build_arguments(str(tmp_path), num_steps=4, save_steps=2))
    typed("--note", "it's two words")
    run_small(build_arguments(str(tmp_path), num_steps=6, resume="auto"))
    record = read_record(tmp_path / "run")
    assert record["commands"] == [
        {"command": "python run_x.py --learning_rate 3e-3", "first_step": 0},
        {"command": """python run_x.py --note 'it'"'"'s two words'""", "first_step": 4},
    ]
    assert record["arguments"]["num_steps"] == 6 and record["arguments"]["processes"] == 1
    assert record["versions"]["mixlm"] == mixlm.__version__

    typed("again")  # from the older checkpoint: what came after it led nowhere
    older = tmp_path / "run" / "checkpoints" / "step-00000004"
    run_small(build_arguments(str(tmp_path), num_steps=5, resume=str(older)))
    found = [each["command"].split()[2] for each in read_record(tmp_path / "run")["commands"]]
    assert found == ["--learning_rate", "again"]

    typed("anew")
    run_small(build_arguments(str(tmp_path), num_steps=2, overwrite_output_dir=True))
    assert [each["command"] for each in read_record(tmp_path / "run")["commands"]] == ["python run_x.py anew"]


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path):
    arguments = build_arguments(str(tmp_path), num_steps=2, resume="auto")
    arguments.run_folder.mkdir()
    record_run(arguments, arguments.to_dict(), first_step=0)
    run_small(arguments)
    assert len(read_record(tmp_path / "run")["commands"]) == 1


def fine_tuning(tmp_path, **fields) -> FineTuningArguments:
    (tmp_path / "out").mkdir(exist_ok=True)
    return FineTuningArguments(output_dir=str(tmp_path / "out"), **fields)


def test_data_and_base_model_are_named_with_their_hashes(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    base = tmp_path / "base"
    for folder in (tmp_path / "data" / "a", tmp_path / "data" / "b", base):
        folder.mkdir(parents=True)
    texts = {"a/dev.json": "서울은 한국의 수도이다.", "b/dev.json": "the capital of the land", "train.json": "부산"}
    for name, text in texts.items():
        (tmp_path / "data" / name).write_text(text, "utf-8")
    record = {"commands": [], "arguments": {}, "data": [], "languages": [], "versions": {}, "device": "CPU"}
    (base / "run.json").write_text(json.dumps({**record, "hub_model_id": "me/base"}))
    arguments = fine_tuning(
        tmp_path,
        model_name_or_path=str(base),
        train_file=[str(tmp_path / "data")],
        validation_file=[str(tmp_path / "data" / "a" / "dev.json")],
    )
    record_run(arguments, arguments.to_dict(), first_step=0)
    found = read_record(tmp_path / "out")
    assert found["base_model"] == {"name": "base", "hub_model_id": "me/base"}
    assert found["languages"] == ["ko", "en"]

    def entry(name: str) -> dict:
        content = texts[name].encode()
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        return {"bytes": len(content), "blake2b": digest}

    assert found["data"] == [
        {"argument": "train_file", "name": "data", "files": [{"name": name, **entry(name)} for name in texts]},
        {"argument": "validation_file", "name": "dev.json", "files": [{"name": "dev.json", **entry("a/dev.json")}]},
    ]
    assert "hf_secret" not in (tmp_path / "out" / "run.json").read_text("utf-8")


def test_a_model_of_the_hub_is_its_own_name(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    arguments = fine_tuning(tmp_path, model_name_or_path="me/base", train_file=[str(tmp_path / "a.json")])
    record_run(arguments, arguments.to_dict(), first_step=0)
    assert read_record(tmp_path / "out")["base_model"] == {"name": "me/base", "hub_model_id": "me/base"}


def test_a_local_dataset_is_known_by_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    arguments = fine_tuning(tmp_path, model_name_or_path="me/base", dataset_name=str(tmp_path / "rows.jsonl"))
    record_run(arguments, arguments.to_dict(), first_step=0)
    (entry,) = read_record(tmp_path / "out")["data"]
    assert entry["name"] == "rows.jsonl" and [file["name"] for file in entry["files"]] == ["rows.jsonl"]


def test_files_may_be_named_in_both_ways(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("{}")
    arguments = fine_tuning(tmp_path, model_name_or_path="me/base", train_file=[str(tmp_path / "a.json"), "b.json"])
    record_run(arguments, arguments.to_dict(), first_step=0)
    assert [file["name"] for file in read_record(tmp_path / "out")["data"][0]["files"]] == ["a.json", "b.json"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", "\xff"])
def test_what_is_no_record_is_one_line(tmp_path, content):
    (tmp_path / "run.json").write_text(content, "latin-1")
    with pytest.raises(UserError, match=f"^{tmp_path}/run.json: is not what a training writes: .*; delete it$"):
        read_record(tmp_path)
