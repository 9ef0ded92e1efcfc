"""What of a folder goes to the Hub, what arrives of it when something breaks off, and what the Hub refuses."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hub_stand_in import TOKEN, HubStandIn, is_large
from huggingface_hub import HfApi
from huggingface_hub.utils import are_progress_bars_disabled, logging
from remote_models import tiny_model, tiny_tokenizer

import mixlm
from mixlm.errors import UserError
from mixlm.hub import (
    HubError,
    card_on_hub,
    files_to_push,
    open_repository,
    push_files,
    require_access,
    require_repository_name,
)
from mixlm.loading import require_source

NAME = "someone/tiny"
CODE = {"configuration.py", "heads.py", "kernels.py", "modeling_mixlm.py"}
MODEL = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", *CODE}


@pytest.fixture
def hub(monkeypatch):
    with HubStandIn() as hub:
        hub.use_here(monkeypatch)
        yield hub


def saved(folder: Path, model_class: type = mixlm.MixLMForPreTraining, **options) -> Path:
    tiny_model(model_class).save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def push(folder: Path, name: str = NAME, private: bool = False) -> bool:
    open_repository(name, private)
    return push_files(folder, files_to_push(folder), name, "a push")


def hashes(folder: Path) -> list[str]:
    """Of the large files, sorted."""
    return sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if is_large(file.name))


def test_what_belongs_on_the_hub_goes_there_and_nothing_else(tmp_path, hub):
    folder = saved(tmp_path / "run")
    for name in ("checkpoints/step-00000001/model", "tensorboard", "predict", ".hub"):
        (folder / name).mkdir(parents=True)
    (folder / "checkpoints/step-00000001/optimizer.safetensors").write_bytes(b"moments")
    (folder / "tensorboard/events.out.tfevents.1").write_bytes(b"curves")
    for name in ("predictions.json", "questions.jsonl", "skipped_answers.jsonl", ".env", "my_script.py", "token"):
        (folder / name).write_text("stays here")
    also = {"README.md", "run.json", "eval_results.json", "reader.json", "curves.png"}
    for name in also:
        (folder / name).write_text("{}")
    push(folder)
    assert set(hub.repositories[NAME]) == MODEL | also
    for name, content in hub.repositories[NAME].items():
        assert content == (folder / name).read_bytes(), name


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "heads.py"])
def test_an_unfinished_model_is_refused(tmp_path, missing):
    folder = saved(tmp_path / "run")
    (folder / missing).unlink()
    with pytest.raises(UserError, match=str(folder)):
        files_to_push(folder)
    with pytest.raises(UserError, match="no finished model is there"):
        files_to_push(tmp_path / "nothing")


def test_a_second_push_sends_what_has_changed(tmp_path, hub):
    folder = saved(tmp_path / "run")
    assert push(folder) and not push(folder)
    (folder / "eval_results.json").write_text("{}")
    assert push(folder)
    assert hub.commits[NAME] == [sorted(MODEL), ["eval_results.json"]]
    assert hub.arrived == hashes(folder)


def test_a_broken_push_goes_on_with_what_has_not_arrived(tmp_path, hub):
    folder = saved(tmp_path / "run", max_shard_size="4KB")
    assert len(hashes(folder)) >= 4
    hub.refuse("PUT /objects/.+", 403, after=2)
    with pytest.raises(HubError, match=f"{NAME}: the Hub answers 403 .*; use a token with write access"):
        push(folder)
    assert 0 < len(hub.arrived) < len(hashes(folder))
    assert hub.repositories[NAME] == {}  # nobody finds half a model
    hub.refusals.clear()
    push(folder)
    assert sorted(hub.arrived) == hashes(folder)  # each once
    assert {path for path in hub.repositories[NAME] if is_large(path)} == {
        file.name for file in folder.glob("*.safetensors")
    }


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_commit_that_is_refused_leaves_what_was_there(tmp_path, hub, status):
    folder = saved(tmp_path / "run")
    push(folder)
    before = dict(hub.repositories[NAME])
    tiny_model(mixlm.MixLMForPreTraining, act_fn="relu").save_pretrained(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes() + b" ")
    hub.refuse(r"POST /api/models/.+/commit/.+", status)
    with pytest.raises(HubError, match=f"{NAME}: the Hub answers {status}"):
        push(folder)
    assert hub.repositories[NAME] == before
    hub.refusals.clear()
    arrived = len(hub.arrived)
    push(folder)
    assert len(hub.arrived) == arrived  # the weights were there already
    assert hub.repositories[NAME]["config.json"] == (folder / "config.json").read_bytes()


def test_what_another_model_has_left_there_does_not_stay_beside_the_new_one(tmp_path, hub):
    """transformers would load model.safetensors rather than the shards, and mixlm read by the older reader.json."""
    first, second = saved(tmp_path / "first"), saved(tmp_path / "second", max_shard_size="4KB")
    (first / "reader.json").write_text("{}")
    push(first)
    hub.repositories[NAME] |= {"README.md": b"of a person", "notes.txt": b"too"}
    push(second)
    there = set(hub.repositories[NAME])
    assert there == {file.name for file in second.iterdir()} | {"README.md", "notes.txt"}
    assert "model.safetensors" not in there and "reader.json" not in there


def test_a_private_repository_is_private(tmp_path, hub, monkeypatch):
    push(saved(tmp_path / "run"), private=True)
    assert hub.private == {NAME}
    assert push(saved(tmp_path / "run", mixlm.MixLMModel))  # it stays so, also where it is not asked for again
    assert hub.private == {NAME}
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(HubError):
        card_on_hub(NAME)


def test_a_public_repository_is_not_taken_for_a_private_one(tmp_path, hub):
    open_repository(NAME, private=False)
    with pytest.raises(UserError, match="is on the Hub already, and public"):
        push(saved(tmp_path / "run"), private=True)
    assert hub.repositories[NAME] == {} and hub.arrived == []


@pytest.mark.parametrize(("private", "said"), [(True, True), (False, None)])
def test_who_may_see_a_new_repository_is_left_to_the_settings_there_unless_it_is_private(
    hub, monkeypatch, private, said
):
    create, asked = HfApi.create_repo, []

    def create_and_note(api, *arguments, **options):
        asked.append(options["private"])
        return create(api, *arguments, **options)

    monkeypatch.setattr(HfApi, "create_repo", create_and_note)
    open_repository(NAME, private)
    assert asked == [said]


@pytest.mark.parametrize(
    "name", ["tiny", "", "a/b/c", "a b/c", "someone/", "/tiny", "someone/-x", "../etc", "a/b.git"]
)
def test_names_the_hub_would_not_have(name):
    with pytest.raises(UserError, match="--hub_model_id .* is not USER/NAME"):
        require_repository_name(name, "--hub_model_id")


def test_a_model_that_is_there_is_found_beside_a_folder_of_its_owners_name(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    with pytest.raises(UserError, match=f"^{NAME}: no such folder, and no model that the Hub gives; check its name$"):
        require_source(NAME)
    assert len(hub.requests) == 1  # asked once
    push(saved(tmp_path / "run"))
    require_source(NAME)


def test_no_token_is_said_before_anything_is_asked(tmp_path, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    for action in (lambda: require_access("--push_to_hub"), lambda: open_repository(NAME, False)):
        with pytest.raises(UserError, match="no token for the Hub; log in with hf auth login, or set HF_TOKEN"):
            action()
    assert hub.requests == []


def test_the_token_of_a_login_is_used(tmp_path, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    require_access("--push_to_hub")
    assert push(saved(tmp_path / "run"))


def test_offline_nothing_is_tried(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        require_access("--push_to_hub")
    assert hub.requests == []


def test_a_token_that_is_not_taken_is_told_and_not_shown(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_secret")
    with pytest.raises(HubError, match="--push_to_hub: the Hub answers 401.*hf auth login.*mixlm push") as caught:
        require_access("--push_to_hub")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_hub_that_is_not_there_is_one_line(monkeypatch):
    with HubStandIn() as hub:
        hub.use_here(monkeypatch)
    with pytest.raises(HubError, match=f"{NAME}: the Hub cannot be reached: ") as caught:
        open_repository(NAME, private=False)
    assert "\n" not in str(caught.value)


def test_a_card_that_cannot_be_had_is_not_taken_for_none(hub):
    open_repository(NAME, private=False)
    assert card_on_hub(NAME) is None
    hub.repositories[NAME]["README.md"] = "제 글".encode()
    assert card_on_hub(NAME) == "제 글"
    hub.refuse(r"HEAD .+README\.md", 403)
    with pytest.raises(HubError):
        card_on_hub(NAME)


@pytest.mark.parametrize("status", [None, 403])
def test_a_quiet_push_leaves_bars_and_messages_as_they_were(tmp_path, hub, status):
    folder = saved(tmp_path / "run")
    open_repository(NAME, private=False)
    if status is not None:
        hub.refuse(r"POST /api/models/.+/commit/.+", status)
    before = logging.get_verbosity()
    logging.set_verbosity_info()
    try:
        with suppress(HubError):
            push_files(folder, files_to_push(folder), NAME, "a push", quiet=True)
        assert not are_progress_bars_disabled() and logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(before)


def test_what_is_pushed_is_the_model(tmp_path, hub):
    """The code comes by the names in config.json, so a head of the other family brings its own."""
    folder = saved(tmp_path / "run", mixlm.MixLMSwitchForRetrieval)
    push(folder)
    assert set(hub.repositories[NAME]) == MODEL | {"modeling_switch.py"}
    there = tmp_path / "there"
    there.mkdir()
    for name, content in hub.repositories[NAME].items():
        (there / name).write_bytes(content)
    expected, found = (mixlm.MixLMSwitchForRetrieval.from_pretrained(each).state_dict() for each in (folder, there))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert json.loads((there / "config.json").read_text("utf-8"))["auto_map"]
