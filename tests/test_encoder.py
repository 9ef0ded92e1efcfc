"""Texts to vectors, and the models that make them."""

import json

import huggingface_hub
import numpy as np
import pytest
import torch
from remote_models import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForTextEncoding, BertConfig, BertModel

import mixlm
from mixlm.data.passages import Passage
from mixlm.encoder import Encoding, MixLMEncoder, load_for_retrieval
from mixlm.errors import UserError

QUERIES = ["서울", "서울 은 한국 의 수도 이다 .", "한국 의 서울", "수도", ""]
PASSAGES = [Passage(str(number), "한국" if number % 2 else "", text) for number, text in enumerate(QUERIES)]
FAMILIES = pytest.mark.parametrize("model_class", [mixlm.MixLMForRetrieval, mixlm.MixLMSwitchForRetrieval])
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def save(folder, model, encoding: Encoding | None = None):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if encoding is not None:
        encoding.save(folder)
    return folder


@FAMILIES
@pytest.mark.parametrize("fields", [{}, {"two_towers": True, "normalize_embeddings": True}], ids=["one", "two"])
def test_a_vector_depends_on_its_text_alone(tmp_path, model_class, fields):
    folder = save(tmp_path, tiny_model(model_class, **fields), Encoding(8, 12))
    encoder = MixLMEncoder.from_pretrained(folder, device="cpu")
    together = encoder.encode_queries(QUERIES), encoder.encode_passages(PASSAGES)
    alone = (
        [encoder.encode_queries([text])[0] for text in QUERIES],
        [encoder.encode_passages([p])[0] for p in PASSAGES],
    )
    encoder.batch_size = 2  # which are made by length, not in the order of the texts
    in_batches = encoder.encode_queries(QUERIES), encoder.encode_passages(PASSAGES)
    for vectors, single, batched in zip(together, alone, in_batches, strict=True):
        assert vectors.shape == (5, 16) and vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, single, **CLOSE)
        np.testing.assert_allclose(vectors, batched, **CLOSE)


@FAMILIES
def test_vectors_are_those_of_the_model(tmp_path, model_class):
    model = tiny_model(model_class, two_towers=True)
    encoder = MixLMEncoder(model.train(), tiny_tokenizer(), Encoding(8, 6))
    assert not model.training
    with torch.no_grad():
        query = model(torch.tensor([[2, 5, 3]])).embeddings[0]
        passage = model(context_input_ids=torch.tensor([[2, 7, 3, 7, 8, 3]])).context_embeddings[0]
        empty = model(context_input_ids=torch.tensor([[2, 3]])).context_embeddings[0]
    np.testing.assert_allclose(encoder.encode_queries(["서울"])[0], query, **CLOSE)
    np.testing.assert_allclose(encoder.encode_passages([Passage("1", "한국", "한국 의 서울")])[0], passage, **CLOSE)
    np.testing.assert_allclose(encoder.encode_empty_passage(), empty, **CLOSE)


def test_no_texts_have_no_vectors():
    encoder = MixLMEncoder(tiny_model(mixlm.MixLMForRetrieval), tiny_tokenizer())
    for vectors in (encoder.encode_queries([]), encoder.encode_passages([])):
        assert vectors.shape == (0, 16) and vectors.dtype == np.float32


def test_an_encoding_is_kept_beside_the_model(tmp_path):
    assert Encoding.load(tmp_path) is None
    encoding = Encoding(max_query_length=9, max_passage_length=11, null_passage=True)
    save(tmp_path, tiny_model(mixlm.MixLMForRetrieval), encoding)
    assert Encoding.load(tmp_path) == encoding
    encoder = MixLMEncoder.from_pretrained(tmp_path)
    assert encoder.encoding == encoding
    assert (encoder.tokenizer.max_query_length, encoder.tokenizer.max_passage_length) == (9, 11)


@FAMILIES
def test_two_towers_are_saved_and_loaded(tmp_path, model_class):
    model = tiny_model(model_class, two_towers=True)
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": torch.tensor([[2, 5, 3]]), "context_input_ids": torch.tensor([[2, 7, 3]])}
    loaded, new_weights = load_for_retrieval(str(tmp_path))
    assert new_weights == [] and type(loaded) is model_class
    for again in (loaded, AutoModelForTextEncoding.from_pretrained(tmp_path)):
        with torch.no_grad():
            found, expected = again.eval()(**inputs), model(**inputs)
        for name in ("embeddings", "context_embeddings"):
            torch.testing.assert_close(found[name], expected[name])


@FAMILIES
def test_a_second_tower_begins_as_the_first(tmp_path, model_class):
    tiny_model(model_class).save_pretrained(tmp_path)
    model, new_weights = load_for_retrieval(str(tmp_path), two_towers=True)
    assert new_weights == [] and model.config.two_towers
    first, second = model.encoder.state_dict(), model.context_encoder.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert all(first[name].data_ptr() != second[name].data_ptr() for name in first)
    kept = load_file(tmp_path / "model.safetensors")
    assert all(
        torch.equal(tensor, kept[f"encoder.{name}"]) for name, tensor in first.items() if f"encoder.{name}" in kept
    )


def test_the_first_tower_is_the_encoder_of_every_other_head(tmp_path):
    model = tiny_model(mixlm.MixLMForRetrieval, two_towers=True)
    model.save_pretrained(tmp_path)
    for auto in (AutoModel, AutoModelForMaskedLM):
        other = auto.from_pretrained(tmp_path)
        found = other.base_model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in model.encoder.state_dict().items())
        assert not [name for name in other.state_dict() if "context_encoder" in name]


@pytest.mark.parametrize(
    "model_class", [mixlm.MixLMModel, mixlm.MixLMForMaskedLM, mixlm.MixLMSwitchForQuestionAnswering]
)
def test_a_model_of_another_head_lacks_a_pooler_alone(tmp_path, model_class):
    source = tiny_model(model_class)
    source.save_pretrained(tmp_path)
    model, new_weights = load_for_retrieval(str(tmp_path))
    assert new_weights == ["pooler.weight"]
    weights = model.encoder.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in source.base_model.state_dict().items())
    assert load_for_retrieval(str(tmp_path), pooler="mean")[1] == []


def test_a_pretrained_model_is_given_texts_as_long_as_it_takes(tmp_path):
    """That of run_pretraining.py may have fewer positions than a passage has by default, and says nothing of them."""
    folder = save(tmp_path, tiny_model(mixlm.MixLMForPreTraining))
    assert MixLMEncoder.from_pretrained(folder).encoding == Encoding(32, 32)
    model = tiny_model(mixlm.MixLMModel)
    model.config.max_position_embeddings = 100
    assert Encoding.of(model) == Encoding(64, 100)


def test_half_a_second_tower_is_no_tower(tmp_path):
    tiny_model(mixlm.MixLMForRetrieval, two_towers=True).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = load_file(file)
    lost = max(name for name in kept if name.startswith("context_encoder."))
    del kept[lost]
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks 1 weights of the encoder, such as {lost}"):
        load_for_retrieval(str(tmp_path))


def no_folder(folder):
    return folder / "nowhere"


def no_model(folder):
    (folder / "text.txt").write_text("x")
    return folder


def not_weights(folder):
    tiny_model(mixlm.MixLMForRetrieval).save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"x")
    return folder


def of_another_library(folder):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=15, **shape)).save_pretrained(folder)
    return folder


def without_a_layer(folder):
    tiny_model(mixlm.MixLMForRetrieval).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 3}))
    return folder


def damaged_configuration(folder):
    tiny_model(mixlm.MixLMForRetrieval).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "mixlm", "hidden_size": [], "num_heads": "x"}')
    return folder


def another_shape(folder):
    tiny_model(mixlm.MixLMForRetrieval).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "ff_dim": 2 * values["ff_dim"]}))
    return folder


def too_short(folder):
    return save(folder, tiny_model(mixlm.MixLMForRetrieval), Encoding(32, 33))


def another_encoding(folder):
    save(folder, tiny_model(mixlm.MixLMForRetrieval))
    (folder / "encoder.json").write_text('{"length": 5}')
    return folder


def not_text(folder):
    save(folder, tiny_model(mixlm.MixLMForRetrieval))
    (folder / "encoder.json").write_bytes(b"\xff")
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_folder, "nowhere: no such folder"),
        (no_model, "cannot be loaded"),
        (not_weights, "cannot be loaded"),
        (of_another_library, "is of type bert; give one of mixlm or mixlm_switch"),
        (without_a_layer, "weights of the encoder, such as encoder."),
        (damaged_configuration, "cannot be loaded"),
        (another_shape, "cannot be loaded"),
        (too_short, "--max_passage_length=33: "),
        (another_encoding, "encoder.json: is not what run_ict.py writes"),
        (not_text, "encoder.json: is not what run_ict.py writes"),
    ],
)
def test_what_cannot_encode_is_refused_in_one_line(tmp_path, make, message):
    with pytest.raises(UserError) as caught:
        MixLMEncoder.from_pretrained(make(tmp_path))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    if make is too_short:
        assert "takes at most 32 tokens" in str(caught.value)


def test_settings_that_the_hub_may_have_are_not_taken_for_absent(tmp_path, monkeypatch):
    """Offline, a model that was downloaded without them is not used with others, unless it is known to have none."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository, revision = tmp_path / "models--someone--retriever", "0" * 40
    (repository / "snapshots" / revision).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    with pytest.raises(UserError, match="^someone/retriever: encoder.json cannot be had: "):
        Encoding.load("someone/retriever")
    (repository / ".no_exist" / revision).mkdir(parents=True)
    (repository / ".no_exist" / revision / "encoder.json").touch()
    assert Encoding.load("someone/retriever") is None
