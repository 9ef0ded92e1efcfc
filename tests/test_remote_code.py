"""A saved folder carries the code of every head: a process without this package loads each of them from it."""

import json
from pathlib import Path

import pytest
import torch
from remote_models import HEADS, run_without_package, tensors_of, tiny_inputs, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import pipeline

import mixlm
from mixlm.heads import EncoderHeads
from mixlm.hub import files_to_push

TEXT = "서울 은 한국 의 [MASK] 이다 ."
# Auto class -> fields of the configuration: the other heads load from a folder with two towers too.
FIELDS = {"AutoModelForTextEncoding": {"two_towers": True, "normalize_embeddings": True}}

# Loads every head from every folder; one process for all, because starting one takes longest.
SCRIPT = """
import json
import torch
import transformers
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, pipeline

auto_classes = json.loads(Path("auto_classes.json").read_text("utf-8"))
text = Path("text").read_text("utf-8")
inputs = load_file("inputs.safetensors")
report, outputs = {"modules": {}, "config_modules": {}}, {}

def tensors_of(output):
    return {name: value.contiguous() for name, value in output.items() if torch.is_tensor(value)}

@torch.no_grad()
def record(key, model):
    model.eval()
    encoded = tensors_of(model.base_model(**inputs))
    outputs.update({f"{key}/{name}": value for name, value in tensors_of(model(**inputs)).items()})
    outputs.update({f"{key}/encoder/{name}": value for name, value in encoded.items()})
    if hasattr(model, "context_encoder"):
        contexts = model(context_input_ids=inputs["input_ids"], context_attention_mask=inputs["attention_mask"])
        outputs.update({f"{key}/contexts/{name}": value for name, value in tensors_of(contexts).items()})

for folder in auto_classes:
    report["config_modules"][folder] = type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__module__
    for auto in auto_classes:
        model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
        report["modules"][f"{folder}/{auto}"] = [type(model).__module__, type(model).__name__]
        record(f"{folder}/{auto}", model)
        if auto == folder:
            model.save_pretrained(f"resaved/{folder}")
            again = getattr(transformers, auto).from_pretrained(f"resaved/{folder}", trust_remote_code=True)
            record(f"resaved/{folder}", again)

report["tokens"] = dict(AutoTokenizer.from_pretrained("AutoModelForMaskedLM")(text))
fill_mask = pipeline("fill-mask", model="AutoModelForMaskedLM", trust_remote_code=True)
report["fill-mask"] = fill_mask(text)
Path("report.json").write_text(json.dumps(report, ensure_ascii=False), "utf-8")
save_file(outputs, "outputs.safetensors")
"""


@pytest.mark.parametrize("name", HEADS)
def test_every_head_in_a_process_without_the_package(name, tmp_path):
    """One test for all that is asked of that process: starting it takes longest, and tests share nothing."""
    heads, inputs, tokenizer = HEADS[name], tiny_inputs(), tiny_tokenizer()
    models = {auto: tiny_model(model_class, **FIELDS.get(auto, {})) for auto, model_class in heads.items()}
    for auto, model in models.items():
        model.save_pretrained(tmp_path / auto)
        tokenizer.save_pretrained(tmp_path / auto)
    save_file(inputs, tmp_path / "inputs.safetensors")
    (tmp_path / "auto_classes.json").write_text(json.dumps(list(heads)), "utf-8")
    (tmp_path / "text").write_text(TEXT, "utf-8")
    run_without_package(SCRIPT, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    outputs = load_file(tmp_path / "outputs.safetensors")

    for folder, model in models.items():
        check_code(tmp_path, folder, heads, name)
        assert report["config_modules"][folder].startswith("transformers_modules.")
        for auto, model_class in heads.items():  # each head loads, with the encoder's weights of any other
            module, class_name = report["modules"][f"{folder}/{auto}"]
            assert module.startswith("transformers_modules.")
            assert class_name == model_class.__name__
            check_outputs(outputs, f"{folder}/{auto}/encoder", model.base_model, inputs)
        check_outputs(outputs, f"{folder}/{folder}", model, inputs)
        check_outputs(outputs, f"resaved/{folder}", model, inputs)

    contexts = {f"context_{name}": inputs[name] for name in ("input_ids", "attention_mask")}
    for place in ("AutoModelForTextEncoding", "resaved"):
        check_outputs(
            outputs, f"{place}/AutoModelForTextEncoding/contexts", models["AutoModelForTextEncoding"], contexts
        )
    assert report["tokens"] == dict(tokenizer(TEXT))
    assert "token_type_ids" in report["tokens"]
    expected = pipeline("fill-mask", model=models["AutoModelForMaskedLM"], tokenizer=tokenizer)(TEXT)
    assert [guess["token_str"] for guess in report["fill-mask"]] == [guess["token_str"] for guess in expected]
    for guess, other in zip(report["fill-mask"], expected, strict=True):
        assert guess["score"] == pytest.approx(other["score"], rel=1e-4)


def check_code(tmp_path: Path, folder: str, heads: dict[str, type], name: str) -> None:
    """The folder holds the code that it needs and names every head; so does one saved from what was loaded of it."""
    needed = {"configuration.py", "heads.py", "kernels.py", "modeling_mixlm.py"}
    if name == "mixlm_switch":
        needed.add("modeling_switch.py")
    config_class = heads[folder].config_class.__name__
    expected = {"AutoConfig": config_class, **{auto: head.__name__ for auto, head in heads.items()}}
    saved, resaved = tmp_path / folder, tmp_path / "resaved" / folder
    for place in (saved, resaved):
        code = {file.name for file in place.glob("*.py")}
        assert code == needed, place
        auto_map = json.loads((place / "config.json").read_text("utf-8"))["auto_map"]
        # Nor does an entry point back to another folder ("folder--module.Class").
        assert {auto: target.partition(".")[2] for auto, target in auto_map.items()} == expected, place
        assert {target.partition(".")[0] + ".py" for target in auto_map.values()} <= code, place
    for file in needed:
        assert (resaved / file).read_bytes() == (saved / file).read_bytes()


@torch.no_grad()
def check_outputs(found: dict[str, torch.Tensor], key: str, module: torch.nn.Module, inputs: dict) -> None:
    """What the other process computed is what `module` computes here."""
    expected = tensors_of(module(**inputs))
    assert expected
    for name, value in expected.items():
        torch.testing.assert_close(found[f"{key}/{name}"], value, rtol=1e-5, atol=1e-6)


class MixLMOfSomebody(mixlm.MixLMForMaskedLM):
    """In a file of its own, beside which there is no model code."""


class SwitchOfSomebody(EncoderHeads, mixlm.MixLMSwitchPreTrainedModel):
    """With a head that no Auto class has."""

    base_model_class = mixlm.MixLMSwitchModel

    def build_heads(self, config) -> None:
        pass


@pytest.mark.parametrize("model_class", [MixLMOfSomebody, SwitchOfSomebody])
def test_a_head_of_ones_own_is_saved_with_the_code_of_the_others(model_class, tmp_path):
    tiny_model(model_class).save_pretrained(tmp_path / "model", True)
    auto_map = json.loads((tmp_path / "model" / "config.json").read_text("utf-8"))["auto_map"]
    code = {file.name for file in (tmp_path / "model").glob("*.py")}
    assert {target.partition(".")[0] + ".py" for target in auto_map.values()} <= code
    assert code <= set(files_to_push(tmp_path / "model"))
    run_without_package(
        "from transformers import AutoModel\nAutoModel.from_pretrained('model', trust_remote_code=True)", tmp_path
    )
