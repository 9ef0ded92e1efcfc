"""What transformers can do when it loads, saves and resizes a model, for every head."""

import pytest
import torch
from accelerate import infer_auto_device_map
from small_models import HEADS, MASKED_LM, NAMES, PRETRAINING, VOCABULARY, batch, build

EVERY_HEAD = pytest.mark.parametrize(("model_class", "fields"), HEADS, ids=NAMES)


@torch.no_grad()
def outputs_of(model, inputs=None):
    """All tensors that a model returns, those of the layers too."""
    outputs = model.eval()(**(inputs or batch()), output_hidden_states=True, output_attentions=True)
    return {
        name: torch.stack(value) if isinstance(value, tuple) else value
        for name, value in outputs.items()
        if value is not None
    }


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@EVERY_HEAD
def test_a_layer_has_hidden_states_and_attentions(model_class, fields):
    model, inputs = build(model_class, layer_group=2, **fields), batch()
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    layers, (rows, length) = model.config.num_hidden_layers, inputs["input_ids"].shape
    assert [tuple(each.shape) for each in outputs.hidden_states] == [(rows, length, 32)] * (layers + 1)
    assert [each.shape[0] for each in outputs.attentions] == [rows] * layers
    for probabilities in outputs.attentions:
        torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(probabilities.shape[:-1]))
        assert probabilities[1, :, :, length // 2 :].eq(0).all()  # the padding of that row


@EVERY_HEAD
def test_weights_in_several_files(model_class, fields, tmp_path):
    model = build(model_class, **fields)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").is_file()
    loaded, report = model_class.from_pretrained(tmp_path, low_cpu_mem_usage=True, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(outputs_of(loaded), outputs_of(model), rtol=0, atol=0)


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EVERY_HEAD
def test_half_precision(model_class, fields, dtype, argument, tmp_path):
    model = build(model_class, **fields)
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path, **{argument: dtype})
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    tolerance = 0.05 if dtype is torch.bfloat16 else 0.01
    found = {name: value.float() for name, value in outputs_of(loaded).items()}
    assert_same(found, outputs_of(model), rtol=tolerance, atol=tolerance)
    loaded.save_pretrained(tmp_path / "again")
    assert model_class.from_pretrained(tmp_path / "again", dtype="auto").dtype == dtype


@EVERY_HEAD
def test_attention_implementations(model_class, fields, tmp_path):
    """Those of transformers compute ordinary attention; carried scores have their own form, whatever is asked for."""
    for residual_attention in (False, True):
        build(model_class, residual_attention=residual_attention, **fields).save_pretrained(tmp_path)
        found = []
        for implementation in ("eager", "sdpa"):
            model = model_class.from_pretrained(tmp_path, attn_implementation=implementation).eval()
            assert model.config._attn_implementation == implementation
            with torch.no_grad():
                found.append(dict(model(**batch()).items()))
        assert_same(*found, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="does not support Flash Attention 2"):
        model_class.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


def device_map(model, offloaded):
    """Every module on the CPU, but for those whose name ends in `offloaded`: on the disk."""
    placed = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{done}.") for done in placed):
            continue
        if name.endswith(offloaded):
            placed[name] = "disk"
        elif list(module.named_parameters(recurse=False)) or not list(module.children()):
            placed[name] = "cpu"
    return placed


@pytest.mark.parametrize("kernels", ["plain", "fused"])
@pytest.mark.parametrize("offloaded", ["stack", "attentions", "feed_forwards.0", ("dense", "experts")])
@EVERY_HEAD
def test_offloaded_to_disk(model_class, fields, offloaded, kernels, tmp_path):
    """What is not in memory is fetched layer by layer, also where several layers call one module."""
    model = build(model_class, kernels=kernels, layer_group=2, shared_parameters="ffn", **fields)
    places = device_map(model, offloaded)
    model.save_pretrained(tmp_path / "saved")
    loaded = model_class.from_pretrained(
        tmp_path / "saved", device_map=places, offload_folder=tmp_path / "offloaded", dtype=torch.float32
    )
    assert any(parameter.is_meta for parameter in loaded.parameters())
    inputs = batch()
    with torch.no_grad():
        found, expected = loaded.eval()(**inputs), model(**inputs)
    assert_same(dict(found.items()), dict(expected.items()), rtol=1e-5, atol=1e-6)
    assert any(parameter.is_meta for parameter in loaded.parameters())


@EVERY_HEAD
def test_a_stack_is_never_spread_over_devices(model_class, fields):
    """Its layers share modules and hand each other the scores: on several devices they would not find each other."""
    model = build(model_class, **fields)
    rooms = {0: "15KB", 1: "15KB", 2: "1GB"}
    places = infer_auto_device_map(model, max_memory=rooms, no_split_module_classes=model._no_split_modules)
    assert len(set(places.values())) > 1
    assert not any("stack." in name for name in places)


@EVERY_HEAD
def test_resizing_keeps_the_tokens(model_class, fields, tmp_path):
    model = build(model_class, **fields)
    before = outputs_of(model)
    model.resize_token_embeddings(VOCABULARY + 7)
    resized = outputs_of(model)
    for name in ("logits", "prediction_logits"):
        if name in resized:
            assert resized[name].shape[-1] == VOCABULARY + 7
            resized[name] = resized[name][..., :VOCABULARY]
    assert_same(resized, before, rtol=1e-5, atol=1e-6)

    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == VOCABULARY + 7
    assert_same(outputs_of(loaded), outputs_of(model), rtol=0, atol=0)

    few = {**batch(), "input_ids": batch()["input_ids"] % 20}
    before = outputs_of(model, few)
    model.resize_token_embeddings(20)
    shrunk = outputs_of(model, few)
    for name in before.keys() & {"logits", "prediction_logits"}:
        before[name] = before[name][..., :20]
    assert_same(shrunk, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_class", [*MASKED_LM, *PRETRAINING])
def test_a_new_token_is_as_likely_as_the_others(model_class):
    model = build(model_class)
    decoder = model.get_output_embeddings()
    with torch.no_grad():
        decoder.bias.copy_(torch.linspace(-9, -7, VOCABULARY))
    model.resize_token_embeddings(VOCABULARY + 3)
    decoder = model.get_output_embeddings()
    assert decoder.weight is model.get_input_embeddings().weight
    assert decoder.bias.requires_grad
    torch.testing.assert_close(decoder.bias[:VOCABULARY].detach(), torch.linspace(-9, -7, VOCABULARY))
    torch.testing.assert_close(decoder.bias[VOCABULARY:].detach(), torch.full((3,), -8.0))
