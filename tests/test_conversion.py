"""Older checkpoints: what is wrong with one is said in a line that names the file, and nothing is half-written."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining, AutoModelForQuestionAnswering

from mixlm import MixLMForRetrieval, MixLMPreTrainedModel, MixLMSwitchForRetrieval
from mixlm.conversion import convert_checkpoint
from mixlm.errors import UserError

LAYER = "bert.encoder.layer."


@pytest.fixture(params=["mixlm", "switch"])
def family(request):
    return request.param


@pytest.fixture(params=["sop", "ict"])
def head(request):
    return request.param


@pytest.fixture
def files(golden, tmp_path, family, head):
    """Copies of a golden checkpoint and of its configuration, and a folder that is not there."""
    checkpoint, config_file = tmp_path / "older.bin", tmp_path / "older.json"
    shutil.copy(golden / f"{family}_preln_{head}_legacy_checkpoint.bin", checkpoint)
    shutil.copy(golden / f"{family}_preln_config.json", config_file)
    return checkpoint, config_file, tmp_path / "out"


def change_weights(checkpoint, change):
    weights = torch.load(checkpoint, weights_only=True)
    change(weights)
    torch.save(weights, checkpoint)


def change_config(config_file, **fields):
    config_file.write_text(json.dumps({**json.loads(config_file.read_text("utf-8")), **fields}), "utf-8")


def contents(folder) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(checkpoint, config_file, out, family, head) -> str:
    """The one-line message of the error; nothing may have been written."""
    before = contents(out.parent)
    with pytest.raises(UserError) as caught:
        convert_checkpoint(checkpoint, config_file, out, family, head)
    assert contents(out.parent) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestWrittenFolder:
    def test_loads_with_every_head_it_has_weights_for(self, files, family, head):
        *_, out = files
        convert_checkpoint(*files, family, head)
        retrieval = MixLMForRetrieval if family == "mixlm" else MixLMSwitchForRetrieval
        heads = [AutoModel, AutoModelForPreTraining, AutoModelForMaskedLM, AutoModelForQuestionAnswering]
        for model_class in heads + ([retrieval] if head == "ict" else []):
            model, report = model_class.from_pretrained(out, output_loading_info=True)
            assert not report["missing_keys"], model_class
            assert not report["mismatched_keys"], model_class
            assert not report["unexpected_keys"], model_class
            assert model.config.pretraining_objective == head

    def test_a_head_without_weights_is_told(self, files, family, head):
        """A sop checkpoint has no pooler: loading one must not look as if it had."""
        *_, out = files
        convert_checkpoint(*files, family, head)
        retrieval = MixLMForRetrieval if family == "mixlm" else MixLMSwitchForRetrieval
        _, report = retrieval.from_pretrained(out, output_loading_info=True)
        assert set(report["missing_keys"]) == ({"pooler.weight"} if head == "sop" else set())

    def test_is_plain_safetensors_and_has_the_code(self, files, family, head):
        *_, out = files
        convert_checkpoint(*files, family, head)
        names = {path.name for path in out.iterdir()}
        assert {"config.json", "model.safetensors", "configuration.py", "modeling_mixlm.py"} <= names
        assert not {name for name in names if name.endswith((".bin", ".pt", ".pkl"))}
        assert sorted(path.name for path in out.parent.iterdir()) == ["older.bin", "older.json", "out"]

    def test_keeps_the_dtype(self, files, family, head):
        checkpoint, config_file, out = files
        change_weights(checkpoint, lambda weights: weights.update({k: v.float() for k, v in weights.items()}))
        convert_checkpoint(checkpoint, config_file, out, family, head)
        assert AutoModel.from_pretrained(out).dtype == torch.float32

    def test_into_an_empty_folder(self, files, family, head):
        *_, out = files
        out.mkdir()
        convert_checkpoint(*files, family, head)
        assert (out / "model.safetensors").is_file()

    def test_into_a_folder_that_has_no_parent_yet(self, files, family, head):
        checkpoint, config_file, out = files
        convert_checkpoint(checkpoint, config_file, str(out / "a" / "b"), family, head)
        assert (out / "a" / "b" / "config.json").is_file()

    def test_a_failure_while_writing_leaves_nothing(self, files, family, head, monkeypatch):
        def fail(self, folder, **kwargs):
            Path(folder, "config.json").write_text("{}")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(MixLMPreTrainedModel, "save_pretrained", fail)
        *_, out = files
        message = refused(*files, family, head)
        assert message.startswith(f"{out}: ") and "No space left" in message


class Bomb:
    """A pickle that makes a file where it is run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class TestBadCheckpoint:
    @pytest.fixture
    def family(self):
        return "mixlm"

    @pytest.fixture
    def head(self):
        return "sop"

    def test_missing(self, files, family, head):
        checkpoint, *_ = files
        checkpoint.unlink()
        assert refused(*files, family, head) == f"{checkpoint}: no such file"

    @pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 not a zip", b"\x80\x02}q\x00", b"{}"])
    def test_not_a_checkpoint(self, files, family, head, content):
        checkpoint, *_ = files
        checkpoint.write_bytes(content)
        assert refused(*files, family, head).startswith(f"{checkpoint}: not a file of plain tensors")

    def test_cut_off(self, files, family, head):
        checkpoint, *_ = files
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
        assert refused(*files, family, head).startswith(f"{checkpoint}: not a file of plain tensors")

    def test_folder(self, files, family, head):
        checkpoint, *_ = files
        checkpoint.unlink()
        checkpoint.mkdir()
        assert refused(*files, family, head).startswith(f"{checkpoint}: not a file of plain tensors")

    @pytest.mark.parametrize(
        "write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))]
    )
    def test_code_in_it_does_not_run(self, files, family, head, write, tmp_path):
        checkpoint, *_ = files
        sign = tmp_path / "it-ran"
        write({"weight": Bomb(sign)}, checkpoint)
        message = refused(*files, family, head)
        assert message.startswith(f"{checkpoint}: ")
        assert "weights_only" not in message, "nobody is told how to run it"
        assert not sign.exists()
        # The bomb is real: a plain load runs it.
        torch.load(checkpoint, weights_only=False) if write is torch.save else pickle.loads(checkpoint.read_bytes())
        assert sign.exists()

    @pytest.mark.parametrize(
        "content, found",
        [
            ([torch.zeros(2)], "a list"),
            (torch.zeros(2), "a Tensor"),
            ({"model": {"weight": torch.zeros(2)}, "step": 3}, "'model' is a dict"),
            ({3: torch.zeros(2)}, "3 is a Tensor"),
        ],
    )
    def test_something_else_than_weights(self, files, family, head, content, found):
        checkpoint, *_ = files
        torch.save(content, checkpoint)
        message = refused(*files, family, head)
        assert message.startswith(f"{checkpoint}: ") and found in message

    def test_no_weights(self, files, family, head):
        checkpoint, *_ = files
        torch.save({}, checkpoint)
        message = refused(*files, family, head)
        assert str(checkpoint) in message and "missing: encoder.embeddings" in message

    @pytest.mark.parametrize(
        "key, said",
        [
            ("cls.dense.weight", "missing: mlm_head.dense.weight"),
            ("decoder.weight", "missing: sop_head.dense.weight"),
            ("qa_outputs.bias", "missing: sop_head.classifier.bias"),
            (f"{LAYER}2.ffn.fc2.bias", "missing: encoder.stack.feed_forwards.1.dense.bias"),
            (f"{LAYER}1.attn.key.0.w_mask", "encoder.stack.attentions.1.key: a slice lacks its w_mask"),
            (
                f"{LAYER}0.ffn.fc1.1.conv.bias",
                "encoder.stack.feed_forwards.0.convolution: a slice lacks its conv.bias",
            ),
        ],
    )
    def test_a_weight_is_missing(self, files, family, head, key, said):
        checkpoint, *_ = files
        change_weights(checkpoint, lambda weights: weights.pop(key))
        message = refused(*files, family, head)
        assert str(checkpoint) in message and said in message

    def test_a_slice_is_missing(self, files, family, head):
        checkpoint, *_ = files

        def change(weights):
            for part in ("w_mask", "conv.weight", "conv.bias"):
                del weights[f"{LAYER}1.attn.key.0.{part}"]

        change_weights(checkpoint, change)
        message = refused(*files, family, head)
        assert str(checkpoint) in message and "encoder.stack.attentions.1.key" in message and "n_experts=2" in message

    @pytest.mark.parametrize("key", ["bert.pooler.weight", "optimizer", "decoder.linear.weight"])
    def test_an_unknown_weight(self, files, family, head, key):
        checkpoint, *_ = files
        change_weights(checkpoint, lambda weights: weights.update({key: torch.zeros(2)}))
        message = refused(*files, family, head)
        assert message.startswith(f"{checkpoint}: ") and repr(key) in message

    def test_another_shape(self, files, family, head):
        checkpoint, *_ = files
        change_weights(checkpoint, lambda weights: weights.update({"cls.dense.weight": torch.zeros(32, 31)}))
        message = refused(*files, family, head)
        assert str(checkpoint) in message and "mlm_head.dense.weight [32, 31] instead of [32, 32]" in message

    def test_integers(self, files, family, head):
        checkpoint, *_ = files
        change_weights(
            checkpoint, lambda weights: weights.update({"cls.dense.bias": torch.zeros(32, dtype=torch.int8)})
        )
        assert "not of floating point: mlm_head.dense.bias" in refused(*files, family, head)

    def test_other_kernels_in_the_mask(self, files, family, head):
        checkpoint, *_ = files

        def change(weights):
            weights[f"{LAYER}0.attn.key.1.w_mask"].fill_(1)

        change_weights(checkpoint, change)
        message = refused(*files, family, head)
        assert str(checkpoint) in message and "kernel group 1 has 9 taps" in message and "gives 7" in message

    def test_a_kernel_that_is_not_centred(self, files, family, head):
        checkpoint, *_ = files

        def change(weights):
            mask = weights[f"{LAYER}0.attn.key.1.w_mask"]
            mask.copy_(mask.roll(1, dims=-1))

        change_weights(checkpoint, change)
        assert str(checkpoint) in refused(*files, family, head)


class TestDoesNotFit:
    def test_wrong_family(self, files, family, head):
        checkpoint, config_file, _ = files
        other = {"mixlm": "switch", "switch": "mixlm"}[family]
        message = refused(*files, other, head)
        assert message.startswith(f"{config_file}: ") and "other family" in message
        config = json.loads(config_file.read_text("utf-8"))
        for field in ("kernel_size", "capacity_factor"):  # a file that does not tell its family
            config.pop(field, None)
        config_file.write_text(json.dumps({**config, "n_experts": 2}), "utf-8")
        assert refused(*files, other, head).startswith(f"{checkpoint}: ")

    def test_wrong_head(self, files, family, head):
        checkpoint, *_ = files
        other = {"sop": "ict", "ict": "sop"}[head]
        message = refused(*files, family, other)
        assert message.startswith(f"{checkpoint}: ") and "decoder" in message and repr(other) in message

    def test_unknown_family_or_head(self, files, family, head):
        assert "'bert' is unknown; use one of mixlm, switch" in refused(*files, "bert", head)
        assert "'nsp' is unknown; use one of sop, ict" in refused(*files, family, "nsp")

    @pytest.mark.parametrize(
        "fields",
        [
            {"hidden_size": 64},
            {"num_hidden_layers": 2},
            {"num_hidden_layers": 6},
            {"n_experts": 4},
            {"n_experts": 1},
            {"ff_dim": 128},
            {"vocab_size": 98},
            {"max_position_embeddings": 23},
            {"layer_group": 1},
            {"layer_group": 4},
            {"shared_parameters": "all"},
            {"shared_parameters": "attention"},
            {"final_layer_norm": True},
        ],
        ids=str,
    )
    def test_another_configuration(self, files, family, head, fields):
        checkpoint, config_file, _ = files
        change_config(config_file, **fields)
        assert str(checkpoint) in refused(*files, family, head)

    @pytest.mark.parametrize("fields", [{"kernel_size": 7}, {"kernel_size": 11}, {"num_heads": 2}, {"num_heads": 1}])
    def test_other_kernels(self, golden, tmp_path, fields):
        config_file = tmp_path / "older.json"
        shutil.copy(golden / "mixlm_preln_config.json", config_file)
        change_config(config_file, **fields)
        checkpoint = golden / "mixlm_preln_sop_legacy_checkpoint.bin"
        message = refused(checkpoint, config_file, tmp_path / "out", "mixlm", "sop")
        assert message.startswith(f"{checkpoint}: ") and "kernel_size" in message


class TestBadConfiguration:
    @pytest.mark.parametrize(
        "content, said",
        [
            ("", "not a JSON file"),
            ("[]", "expected an object"),
            ('{"model_type": "bert"}', "model_type='bert'"),
            ('{"hidden_size": "wide"}', "hidden_size"),
            ('{"ln_pos": 2}', "ln_pos=2"),
            ('{"embedding_size": 8, "hidden_size": 32}', "embedding_size=8"),
        ],
    )
    def test_content(self, files, family, head, content, said):
        _, config_file, _ = files
        config_file.write_text(content, "utf-8")
        message = refused(*files, family, head)
        assert message.startswith(f"{config_file}: ") and message.count(str(config_file)) == 1
        assert said in message

    def test_missing(self, files, family, head):
        _, config_file, _ = files
        config_file.unlink()
        assert refused(*files, family, head).startswith(f"{config_file}: neither a file nor a preset")


class TestBadTarget:
    def test_a_file(self, files, family, head):
        *_, out = files
        out.write_text("mine")
        assert refused(*files, family, head).startswith(f"{out}: is a file")
        assert out.read_text() == "mine"

    def test_a_folder_with_something_in_it(self, files, family, head):
        *_, out = files
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        assert refused(*files, family, head).startswith(f"{out}: exists and is not empty")

    def test_below_a_file(self, files, family, head):
        checkpoint, config_file, _ = files
        out = config_file / "out"
        before = contents(config_file.parent)
        with pytest.raises(UserError, match=f"{out}: cannot be written"):
            convert_checkpoint(checkpoint, config_file, out, family, head)
        assert contents(config_file.parent) == before
