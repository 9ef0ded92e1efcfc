import json
import pickletools
import shutil
import zipfile

import pytest
import torch

from mixlm.data.batching import Position
from mixlm.errors import UserError
from mixlm.training import checkpoint as checkpoint_module
from mixlm.training.checkpoint import (
    TrainingState,
    checkpoints_in,
    load_checkpoint,
    optimizer_tensors,
    prune,
    read_state,
    save_checkpoint,
)
from mixlm.training.optimization import build_optimizer

STATE = TrainingState(3, Position(1, 2, 3, 4))
ARGUMENTS = {"model_name": "한글", "learning_rate": 0.001}


@pytest.fixture
def trained(make_model, make_rows):
    """(family, ...) -> a model and its AdamW after 3 steps."""

    def train(family="mixlm", **fields):
        model = make_model(family, **fields)
        optimizer = new_optimizer(model)
        for first in range(3):
            model(**make_rows("SOP", range(first, first + 4))).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    return train


def new_optimizer(model):
    return build_optimizer(model, learning_rate=1e-2, weight_decay=0.1, epsilon=1e-8)


def saved(folder, model, optimizer, state=STATE):
    save_checkpoint(folder, model, optimizer, state, ARGUMENTS)
    return folder


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]), name


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("family", "fields"), [("mixlm", {}), ("mixlm", {"layer_group": 2}), ("switch", {"pooler": "mean"})]
)
def test_bits_come_back_by_parameter_name(tmp_path, trained, make_model, family, fields):
    model, optimizer = trained(family, **fields)
    folder = saved(tmp_path / "step-00000003", model, optimizer)
    other = make_model(family, seed=9, **fields)
    other_optimizer = new_optimizer(other)
    state, arguments = load_checkpoint(folder, other, other_optimizer)
    assert state == STATE and arguments == ARGUMENTS
    assert_same_bits(other.state_dict(), model.state_dict())
    expected = optimizer_tensors(model, optimizer)
    assert expected.keys() == {
        f"{part}/{name}" for name, _ in model.named_parameters() for part in ("exp_avg", "exp_avg_sq", "step")
    }
    assert all(float(value) == 3 for name, value in expected.items() if name.startswith("step/"))
    assert_same_bits(optimizer_tensors(other, other_optimizer), expected)


def test_the_next_step_is_the_same_to_the_bit(tmp_path, trained, make_model, make_rows):
    model, optimizer = trained()
    folder = saved(tmp_path / "step-00000003", model, optimizer)
    other = make_model(seed=9)
    other_optimizer = new_optimizer(other)
    load_checkpoint(folder, other, other_optimizer)
    for one, its_optimizer in ((model, optimizer), (other, other_optimizer)):
        one(**make_rows("SOP", range(8))).loss.backward()
        its_optimizer.step()
    assert_same_bits(other.state_dict(), model.state_dict())


def test_tied_weights_are_written_once_and_stay_tied(tmp_path, trained, make_model):
    model, optimizer = trained()
    folder = saved(tmp_path / "step-00000003", model, optimizer)
    other = make_model(seed=9)
    load_checkpoint(folder, other, new_optimizer(other))
    assert other.mlm_head.decoder.weight is other.encoder.embeddings.word_embeddings.weight
    assert torch.equal(other.mlm_head.decoder.weight, model.mlm_head.decoder.weight)


def test_the_model_is_plain_from_pretrained(tmp_path, trained):
    model, optimizer = trained("switch")
    folder = saved(tmp_path / "step-00000003", model, optimizer)
    loaded = type(model).from_pretrained(folder / "model")
    assert_same_bits(loaded.state_dict(), model.state_dict())


def test_a_parameter_without_state_stays_without(tmp_path, make_model):
    model = make_model()
    folder = saved(tmp_path / "step-00000000", model, new_optimizer(model))
    other_optimizer = new_optimizer(other := make_model(seed=9))
    load_checkpoint(folder, other, other_optimizer)
    assert not other_optimizer.state


def test_state_json_is_readable_and_names_every_file(tmp_path, trained):
    folder = saved(tmp_path / "step-00000003", *trained())
    text = (folder / "state.json").read_text("utf-8")
    assert "한글" in text and text.count("\n") > 10
    state = read_state(folder)
    assert state == json.loads(text)
    assert state["step"] == 3 and state["arguments"] == ARGUMENTS
    assert state["position"] == {"epoch": 1, "window": 2, "batch": 3, "step_in_epoch": 4}
    assert state["versions"].keys() == {"torch", "transformers", "accelerate"}
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {*state["files"], "state.json"}
    assert {"model/model.safetensors", "model/config.json", "optimizer.safetensors"} <= files


def test_nothing_in_it_is_a_pickle(tmp_path, trained):
    folder = saved(tmp_path / "step-00000003", *trained())
    for path in folder.rglob("*"):
        if path.is_file():
            assert path.suffix in (".json", ".safetensors", ".py")
            assert not zipfile.is_zipfile(path)
            with pytest.raises(ValueError), path.open("rb") as file:
                for _ in pickletools.genops(file):
                    pass


@pytest.mark.parametrize("name", ["model/model.safetensors", "optimizer.safetensors", "model/config.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_file_is_named(tmp_path, trained, make_model, name, damage):
    folder = saved(tmp_path / "step-00000003", *trained())
    path = folder / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    model = make_model(seed=9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_checkpoint(folder, model, new_optimizer(model))
    assert str(path) in str(caught.value)
    assert_same_bits(model.state_dict(), before)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"step": 3, "files": 1}', "\xff"])
def test_a_damaged_state_is_named(tmp_path, trained, make_model, text):
    folder = saved(tmp_path / "step-00000003", *trained())
    (folder / "state.json").write_bytes(text.encode("latin-1"))
    model = make_model()
    with pytest.raises(UserError, match="state.json"):
        load_checkpoint(folder, model, new_optimizer(model))


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path, make_model):
    model = make_model()
    with pytest.raises(UserError) as caught:
        load_checkpoint(tmp_path, model, new_optimizer(model))
    assert str(caught.value).startswith(f"{tmp_path}: not a checkpoint")


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("switch", {}),
        ("mixlm", {"task": "ICT"}),
        ("mixlm", {"hidden_size": 32}),
        ("mixlm", {"num_hidden_layers": 1}),
        ("mixlm", {"vocab_size": 41}),
    ],
)
def test_the_checkpoint_of_another_model_is_named(tmp_path, trained, make_model, family, fields):
    folder = saved(tmp_path / "step-00000003", *trained())
    model = make_model(family, **fields)
    with pytest.raises(UserError) as caught:
        load_checkpoint(folder, model, new_optimizer(model))
    assert str(caught.value).startswith(f"{folder}: holds another model")
    assert "\n" not in str(caught.value)


def test_an_interrupted_write_leaves_the_earlier_checkpoints_and_no_new_one(tmp_path, trained, monkeypatch):
    model, optimizer = trained()
    first = saved(tmp_path / "step-00000003", model, optimizer)
    before = contents(first)

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint_module, "save_file", fail)
    for name in ("step-00000004", "step-00000003"):  # a new one, and the same one again
        with pytest.raises(OSError, match="no space left"):
            saved(tmp_path / name, model, optimizer)
        assert checkpoints_in(tmp_path) == [first]
        assert contents(first) == before
    monkeypatch.undo()
    saved(tmp_path / "step-00000004", model, optimizer)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000003", "step-00000004"]
    assert not (tmp_path / ".step-00000004.partial").exists()


def test_leftovers_of_a_killed_process_are_no_checkpoints_and_no_hindrance(tmp_path, trained, make_model):
    leftover = tmp_path / ".step-00000003.partial"
    (leftover / "model").mkdir(parents=True)
    (leftover / "model" / "stranger.bin").write_text("half")
    for name in ("step-", "step-x", "step-00000009.old", "model"):
        (tmp_path / name).mkdir()
    assert checkpoints_in(tmp_path) == []
    folder = saved(tmp_path / "step-00000003", *trained())
    assert checkpoints_in(tmp_path) == [folder]
    assert not leftover.exists() and not (folder / "model" / "stranger.bin").exists()
    load_checkpoint(folder, model := make_model(), new_optimizer(model))


def empty_checkpoints(folder, steps):
    for step in steps:
        (folder / f"step-{step:d}").mkdir()
        (folder / f"step-{step:d}" / "state.json").write_text("{}")


def test_prune_keeps_what_it_is_told(tmp_path):
    empty_checkpoints(tmp_path, (9, 10, 100, 20))
    (tmp_path / ".step-5.partial").mkdir()
    prune(tmp_path, [tmp_path / "step-10", tmp_path / "step-20"])
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-10", "step-20"]


def test_what_is_half_deleted_is_no_checkpoint(tmp_path, monkeypatch):
    empty_checkpoints(tmp_path, (1, 2))
    monkeypatch.setattr(shutil, "rmtree", lambda path: None)  # as if killed before it
    prune(tmp_path, [tmp_path / "step-2"])
    assert (tmp_path / "step-1").is_dir()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-2"]


def test_an_untied_decoder_resumes(tmp_path, make_model):
    model = make_model(tie_word_embeddings=False)
    folder = saved(tmp_path / "step-00000001", model, new_optimizer(model))
    other = make_model(seed=9, tie_word_embeddings=False)
    load_checkpoint(folder, other, new_optimizer(other))
    assert torch.equal(other.mlm_head.decoder.weight, model.mlm_head.decoder.weight)


def test_a_moved_checkpoint_is_still_one(tmp_path, trained, make_model):
    folder = saved(tmp_path / "step-00000003", *trained())
    shutil.move(folder, tmp_path / "elsewhere")
    model = make_model(seed=9)
    state, _ = load_checkpoint(tmp_path / "elsewhere", model, new_optimizer(model))
    assert state == STATE
