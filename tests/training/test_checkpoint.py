import errno
import json
import pickletools
import shutil
import zipfile
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

from mixlm.data.batching import Position
from mixlm.errors import UserError
from mixlm.training import checkpoint as checkpoint_module
from mixlm.training.checkpoint import (
    TrainingState,
    checkpoints_in,
    load_checkpoint,
    prune,
    read_state,
    save_checkpoint,
    skeleton_of,
    verify,
)
from mixlm.training.optimization import OptimizerSettings
from mixlm.training.sharding import Engine

STATE = TrainingState(3, Position(1, 2, 3, 4))
ARGUMENTS = {"model_name": "한글", "learning_rate": 0.001}


@pytest.fixture
def trained(make_model, make_rows):
    """(family, ...) -> the engine of a model after 3 steps."""

    def train(family="mixlm", **fields):
        engine = engine_of(make_model(family, **fields))
        for first in range(3):
            engine(**make_rows("SOP", range(first, first + 4))).loss.backward()
            engine.step(learning_rate=1e-2)
        return engine

    return train


def engine_of(model):
    return Engine(model, OptimizerSettings(learning_rate=1e-2, weight_decay=0.1, epsilon=1e-8), "fp32")


def saved(folder, engine, state=STATE):
    parameters, moments = dict(engine.whole_parameters()), dict(engine.whole_moments())
    save_checkpoint(folder, skeleton_of(engine.module), parameters, moments, state, ARGUMENTS)
    return folder


def restored(folder, model):
    """The engine of the model, filled from a checkpoint."""
    verify(folder)
    _, _, read_moments = load_checkpoint(folder, model)
    engine = engine_of(model)
    engine.load_moments(read_moments)
    return engine


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
    engine = trained(family, **fields)
    folder = saved(tmp_path / "step-00000003", engine)
    state, arguments, _ = load_checkpoint(folder, make_model(family, seed=9, **fields))
    assert state == STATE and arguments == ARGUMENTS
    other = restored(folder, make_model(family, seed=9, **fields))
    assert_same_bits(other.module.state_dict(), engine.module.state_dict())
    expected = dict(engine.whole_moments())
    assert expected.keys() == {
        f"{part}/{name}" for name, _ in engine.module.named_parameters() for part in ("exp_avg", "exp_avg_sq", "step")
    }
    assert all(float(value) == 3 for name, value in expected.items() if name.startswith("step/"))
    assert_same_bits(dict(other.whole_moments()), expected)


def test_the_next_step_is_the_same_to_the_bit(tmp_path, trained, make_model, make_rows):
    engine = trained()
    other = restored(saved(tmp_path / "step-00000003", engine), make_model(seed=9))
    for one in (engine, other):
        one(**make_rows("SOP", range(8))).loss.backward()
        one.step(learning_rate=1e-2)
    assert_same_bits(other.module.state_dict(), engine.module.state_dict())


def test_tied_weights_are_written_once_and_stay_tied(tmp_path, trained, make_model):
    engine = trained()
    other = restored(saved(tmp_path / "step-00000003", engine), make_model(seed=9)).module
    assert other.mlm_head.decoder.weight is other.encoder.embeddings.word_embeddings.weight
    assert torch.equal(other.mlm_head.decoder.weight, engine.module.mlm_head.decoder.weight)


def test_the_model_is_plain_from_pretrained(tmp_path, trained):
    model = (engine := trained("switch")).module
    folder = saved(tmp_path / "step-00000003", engine)
    loaded = type(model).from_pretrained(folder / "model")
    assert_same_bits(loaded.state_dict(), model.state_dict())


def test_a_parameter_without_state_stays_without(tmp_path, make_model):
    folder = saved(tmp_path / "step-00000000", engine_of(make_model()))
    assert not restored(folder, make_model(seed=9)).optimizer.state


def test_state_json_is_readable_and_names_every_file(tmp_path, trained):
    folder = saved(tmp_path / "step-00000003", trained())
    text = (folder / "state.json").read_text("utf-8")
    assert "한글" in text and text.count("\n") > 10
    state = read_state(folder)
    written = json.loads(text)
    assert written.pop("hash") and written == state
    assert state["step"] == 3 and state["arguments"] == ARGUMENTS
    assert state["position"] == {"epoch": 1, "window": 2, "batch": 3, "step_in_epoch": 4}
    assert state["versions"].keys() == {"torch", "transformers", "accelerate"}
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {*state["files"], "state.json"}
    assert {"model/model.safetensors", "model/config.json", "optimizer.safetensors"} <= files


def test_nothing_in_it_is_a_pickle(tmp_path, trained):
    folder = saved(tmp_path / "step-00000003", trained())
    for path in folder.rglob("*"):
        if path.is_file():
            assert path.suffix in (".json", ".safetensors", ".py")
            assert not zipfile.is_zipfile(path)
            with pytest.raises(ValueError), path.open("rb") as file:
                for _ in pickletools.genops(file):
                    pass


@pytest.mark.parametrize("name", ["model/model.safetensors", "optimizer.safetensors", "model/config.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_file_is_named(tmp_path, trained, name, damage):
    folder = saved(tmp_path / "step-00000003", trained())
    path = folder / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError) as caught:
        verify(folder)
    assert str(path) in str(caught.value)


def test_a_changed_state_is_named(tmp_path, trained):
    """As a damaged disk leaves it: still readable, with another number, or without the hashes of the files."""
    folder = saved(tmp_path / "step-00000003", trained())
    written = json.loads((folder / "state.json").read_text("utf-8"))
    for change in ({"step": 2}, {"files": {}}, {"position": {**written["position"], "batch": 4}}):
        (folder / "state.json").write_text(json.dumps({**written, **change}), "utf-8")
        with pytest.raises(UserError, match=r"state.json: damaged \(ValueError: not what was written\)"):
            verify(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"step": 3, "files": 1}', "\xff"])
def test_a_damaged_state_is_named(tmp_path, trained, make_model, text):
    folder = saved(tmp_path / "step-00000003", trained())
    (folder / "state.json").write_bytes(text.encode("latin-1"))
    for read in (verify, lambda folder: load_checkpoint(folder, make_model())):
        with pytest.raises(UserError, match="state.json"):
            read(folder)


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError) as caught:
        verify(tmp_path)
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
    folder = saved(tmp_path / "step-00000003", trained())
    model = make_model(family, seed=9, **fields)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_checkpoint(folder, model)
    assert str(caught.value).startswith(f"{folder}: holds another model")
    assert "\n" not in str(caught.value)
    assert_same_bits(model.state_dict(), before)


def test_an_interrupted_write_leaves_the_earlier_checkpoints_and_no_new_one(tmp_path, trained, monkeypatch):
    first = saved(tmp_path / "step-00000003", engine := trained())
    before = contents(first)

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint_module, "save_file", fail)
    for name in ("step-00000004", "step-00000003"):  # a new one, and the same one again
        with pytest.raises(OSError, match="no space left"):
            saved(tmp_path / name, engine)
        assert checkpoints_in(tmp_path) == [first]
        assert contents(first) == before
    monkeypatch.undo()
    saved(tmp_path / "step-00000004", engine)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000003", "step-00000004"]
    assert not (tmp_path / ".step-00000004.partial").exists()


def test_nothing_is_begun_where_there_is_no_room(tmp_path, trained, monkeypatch):
    engine = trained()
    tensors = [*dict(engine.whole_parameters()).values(), *dict(engine.whole_moments()).values()]
    needed = sum(tensor.nbytes for tensor in tensors) + checkpoint_module.SPARE_BYTES
    room = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: room)
    with pytest.raises(OSError, match="MiB are needed and 16 MiB are free") as caught:
        saved(tmp_path / "checkpoints" / "step-00000003", engine)
    assert caught.value.errno == errno.ENOSPC
    assert list((tmp_path / "checkpoints").iterdir()) == []
    room.free = needed
    saved(tmp_path / "checkpoints" / "step-00000003", engine)


def test_leftovers_of_a_killed_process_are_no_checkpoints_and_no_hindrance(tmp_path, trained, make_model):
    leftover = tmp_path / ".step-00000003.partial"
    (leftover / "model").mkdir(parents=True)
    (leftover / "model" / "stranger.bin").write_text("half")
    for name in ("step-", "step-x", "step-00000009.old", "model"):
        (tmp_path / name).mkdir()
    assert checkpoints_in(tmp_path) == []
    folder = saved(tmp_path / "step-00000003", trained())
    assert checkpoints_in(tmp_path) == [folder]
    assert not leftover.exists() and not (folder / "model" / "stranger.bin").exists()
    restored(folder, make_model())


def empty_checkpoints(folder, steps):
    for step in steps:
        (folder / f"step-{step:d}").mkdir()
        (folder / f"step-{step:d}" / "state.json").write_text("{}")


def test_prune_keeps_what_it_is_told(tmp_path):
    empty_checkpoints(tmp_path, (9, 10, 100, 20))
    prune(tmp_path, [tmp_path / "step-10", tmp_path / "step-20"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-20"]


def test_prune_deletes_what_a_killed_process_has_left_and_nothing_of_others(tmp_path):
    empty_checkpoints(tmp_path, (10,))
    for name in (".step-00000005.partial", ".step-00000006.earlier", "step-00000007", ".partial", "step-x", "mine"):
        (tmp_path / name / "model").mkdir(parents=True)
    prune(tmp_path, [tmp_path / "step-10"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".partial", "mine", "step-10", "step-x"]


def test_what_is_half_deleted_is_no_checkpoint(tmp_path, monkeypatch):
    empty_checkpoints(tmp_path, (1, 2))
    monkeypatch.setattr(shutil, "rmtree", lambda path: None)  # as if killed before it
    prune(tmp_path, [tmp_path / "step-2"])
    assert (tmp_path / "step-1").is_dir()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-2"]


def test_an_untied_decoder_resumes(tmp_path, make_model):
    model = make_model(tie_word_embeddings=False)
    folder = saved(tmp_path / "step-00000001", engine_of(model))
    other = restored(folder, make_model(seed=9, tie_word_embeddings=False)).module
    assert torch.equal(other.mlm_head.decoder.weight, model.mlm_head.decoder.weight)


def test_a_moved_checkpoint_is_still_one(tmp_path, trained, make_model):
    folder = saved(tmp_path / "step-00000003", trained())
    shutil.move(folder, tmp_path / "elsewhere")
    verify(tmp_path / "elsewhere")
    state, _, _ = load_checkpoint(tmp_path / "elsewhere", make_model(seed=9))
    assert state == STATE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skeleton_has_no_numbers_and_makes_the_same_folder(tmp_path, make_model, dtype):
    model = make_model("switch").to(dtype)
    skeleton = skeleton_of(model)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    skeleton.save_pretrained(tmp_path / "one", state_dict=dict(engine_of(model).whole_parameters()))
    model.save_pretrained(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_weights_are_in_one_file_whatever_their_size(tmp_path, trained, make_model, monkeypatch):
    """Which is what is read: by itself transformers cuts those above 50 GB into several."""
    save = PreTrainedModel.save_pretrained

    def save_in_small_files(self, folder, max_shard_size="1KB", **options):
        save(self, folder, max_shard_size=max_shard_size, **options)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_in_small_files)
    folder = saved(tmp_path / "step-00000001", trained())
    assert [file.name for file in (folder / "model").glob("*.safetensors")] == ["model.safetensors"]
    restored(folder, make_model())
