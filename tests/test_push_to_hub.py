"""Heads and tokenizers go to the Hub, and come back by name in a process that has neither package nor files."""

import json
import re

import pytest
import torch
from hub_stand_in import HubStandIn
from remote_models import (
    HEADS,
    TEXTS,
    run_with_package,
    run_without_package,
    tensors_of,
    tiny_inputs,
    tiny_model,
    tiny_tokenizer,
)
from safetensors.torch import load_file, save_file

import mixlm
from mixlm.encoder import Encoding
from mixlm.training.publishing import publish

PUSH = """
from transformers import AutoModelForMaskedLM, AutoTokenizer
import mixlm  # the Auto classes know the models from here on

name = "someone/tiny"
model = AutoModelForMaskedLM.from_pretrained("local")
for _ in range(2):  # the second time nothing has changed
    model.push_to_hub(name)
    AutoTokenizer.from_pretrained("local").push_to_hub(name)
"""

LOAD = """
import json
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline
import torch

name = "someone/tiny"
texts = json.loads(Path("texts.json").read_text("utf-8"))
inputs = dict(AutoTokenizer.from_pretrained(name)(texts, padding=True, return_tensors="pt"))
model = AutoModelForMaskedLM.from_pretrained(name, trust_remote_code=True).eval()
encoder = AutoModel.from_pretrained(name, trust_remote_code=True).eval()
with torch.no_grad():
    outputs = {"logits": model(**inputs).logits, "hidden": encoder(**inputs).last_hidden_state}
save_file({**inputs, **outputs}, "outputs.safetensors")
assert len(pipeline("fill-mask", model=name, trust_remote_code=True)("서울 은 [MASK] .")) == 5
model.save_pretrained("resaved")
"""


@pytest.mark.parametrize("family", HEADS)
def test_push_and_load_by_name(family, tmp_path):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    model, inputs = tiny_model(HEADS[family]["AutoModelForMaskedLM"]), tiny_inputs()
    model.save_pretrained(here / "local")
    tiny_tokenizer().save_pretrained(here / "local")
    (elsewhere / "texts.json").write_text(json.dumps(TEXTS), "utf-8")
    with HubStandIn() as hub:
        run_with_package(PUSH, here, **hub.environment)
        files = hub.repositories["someone/tiny"]
        run_without_package(LOAD, elsewhere, **hub.environment)

    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "heads.py"}
    assert expected <= set(files)
    code = {path for path in files if path.endswith(".py")}
    assert code == {file.name for file in (here / "local").glob("*.py")}
    assert len(hub.commits["someone/tiny"]) == 2  # model, tokenizer; a push that changes nothing makes no commit
    outputs = load_file(elsewhere / "outputs.safetensors")
    for name, value in inputs.items():
        assert torch.equal(outputs[name], value)
    with torch.no_grad():
        logits, hidden = model(**inputs).logits, model.encoder(**inputs).last_hidden_state
    torch.testing.assert_close(outputs["logits"], logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs["hidden"], hidden, rtol=1e-5, atol=1e-6)
    # A folder saved from what came by name brings its own code: no entry points back to the name.
    auto_map = json.loads((elsewhere / "resaved" / "config.json").read_text("utf-8"))["auto_map"]
    assert auto_map == model.auto_classes
    assert code == {file.name for file in (elsewhere / "resaved").glob("*.py")}


# Every head by its name, the pipelines, and what the cards say is the way to load them.
LOAD_ALL = """
import json
from pathlib import Path
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, pipeline

inputs, outputs = load_file("inputs.safetensors"), {}
for auto, examples in json.loads(Path("examples.json").read_text("utf-8")).items():
    name = f"someone/{auto}"
    model = getattr(transformers, auto).from_pretrained(name, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        found = model(**inputs)
    outputs |= {f"{auto}/{key}": value.contiguous() for key, value in found.items() if torch.is_tensor(value)}
    vectors = pipeline("feature-extraction", model=name, trust_remote_code=True)("서울 은 한국", return_tensors=True)
    outputs[f"{auto}/vectors"] = vectors.contiguous()
    exec(examples, {})
fill_mask = pipeline("fill-mask", model="someone/AutoModelForPreTraining", trust_remote_code=True)
assert len(fill_mask("서울 은 [MASK] .")) == 5
save_file(outputs, "outputs.safetensors")
"""


@pytest.mark.parametrize("family", HEADS)
def test_every_head_by_name_without_the_package(family, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    models = {auto: tiny_model(model_class) for auto, model_class in HEADS[family].items()}
    inputs, tokenizer, examples = tiny_inputs(), tiny_tokenizer(), {}
    save_file(inputs, elsewhere / "inputs.safetensors")
    with HubStandIn() as hub:
        hub.use_here(monkeypatch)
        for auto, model in models.items():
            model.save_pretrained(tmp_path / auto)
            tokenizer.save_pretrained(tmp_path / auto)
            publish(tmp_path / auto, f"someone/{auto}", private=auto == "AutoModel")
            card = hub.repositories[f"someone/{auto}"]["README.md"].decode()
            examples[auto] = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]
        (elsewhere / "examples.json").write_text(json.dumps(examples), "utf-8")
        run_without_package(LOAD_ALL, elsewhere, **hub.environment)

    outputs = load_file(elsewhere / "outputs.safetensors")
    text = tokenizer("서울 은 한국", return_tensors="pt")
    for auto, model in models.items():
        with torch.no_grad():
            expected = tensors_of(model(**inputs)) | {"vectors": model.base_model(**text).last_hidden_state}
        for key, value in expected.items():
            torch.testing.assert_close(outputs[f"{auto}/{key}"], value, rtol=1e-5, atol=1e-6)


READ_SETTINGS = """
from mixlm.encoder import Encoding, MixLMEncoder
from mixlm.reader import Decoding
assert MixLMEncoder.from_pretrained("someone/retriever").encoding == Encoding(9, 11, null_passage=True)
assert Decoding.load("someone/retriever") is None
assert Encoding.load("someone/retriever") == Encoding(9, 11, null_passage=True)
"""


def test_the_settings_beside_a_model_are_loaded_by_name_too(tmp_path):
    tiny_model(mixlm.MixLMForRetrieval).save_pretrained(tmp_path / "local")
    tiny_tokenizer().save_pretrained(tmp_path / "local")
    Encoding(9, 11, null_passage=True).save(tmp_path / "local")
    with HubStandIn() as hub:
        hub.repositories["someone/retriever"] = {
            file.name: file.read_bytes() for file in (tmp_path / "local").iterdir()
        }
        run_with_package(READ_SETTINGS, tmp_path, **hub.environment, HF_HOME=str(tmp_path / "home"))
