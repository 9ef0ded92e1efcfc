"""ONNX graphs give what their models give."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from remote_models import tiny_model

import mixlm
from mixlm.exporting.graphs import (
    GraphModel,
    graphs_of_encoder,
    graphs_of_reader,
    routers_in_64_bits,
    write_graph,
    write_int8,
)
from mixlm.kernels import Kernels
from mixlm.modeling_switch import SwitchFeedForward

PLAIN = Kernels(fused=False, recompute=False)
# Each model has what the others have not: an export takes seconds.
MODELS = {
    "encoder": (mixlm.MixLMForRetrieval, {"kernels": "fused", "num_hidden_layers": 2}),
    "two towers": (
        mixlm.MixLMSwitchForRetrieval,
        {"two_towers": True, "pooler": "mean", "normalize_embeddings": True, "num_hidden_layers": 1},
    ),
    "reader": (mixlm.MixLMForQuestionAnswering, {"residual_attention": False, "ln_pos": 1, "num_hidden_layers": 1}),
    "switch reader": (
        mixlm.MixLMSwitchForQuestionAnswering,
        {"router_scaling": "straight-through", "n_experts": 3, "num_hidden_layers": 1},
    ),
}
EACH_MODEL = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Callable[[str], tuple[torch.nn.Module, GraphModel, Path]]:
    """By name a model, what was exported of it, and the folder; each is exported once, when it is asked for."""
    folder = tmp_path_factory.mktemp("graphs")

    @cache
    def export(name: str) -> tuple[torch.nn.Module, GraphModel, Path]:
        model_class, fields = MODELS[name]
        model = tiny_model(model_class, **fields)
        graphs = graphs_of_reader() if "reader" in name else graphs_of_encoder(model)
        files = {graph.name: folder / f"{name} {graph.name}.onnx" for graph in graphs}
        for graph in graphs:
            write_graph(model, graph, files[graph.name])
        return model, GraphModel(files, threads=1), folder

    return export


def batch(rows: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids whose rows are real up to a length of their own, and anything behind it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 15, (rows, length), generator=generator)
    lengths = torch.randint(1, length + 1, (rows,), generator=generator)
    lengths[0] = length
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}


def calls(name: str, inputs: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """What a batch is to a model: a reader's windows; or questions, and passages."""
    if "reader" in name:
        positions = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])
        return [{**inputs, "token_type_ids": (positions > 2).long()}]
    return [inputs, {f"context_{key}": tensor for key, tensor in inputs.items()}]


def outputs_of(model, inputs: dict[str, torch.Tensor], like) -> dict[str, np.ndarray]:
    with torch.no_grad():
        outputs = model(**inputs)
    return {name: getattr(outputs, name).numpy() for name in vars(like)}


@EACH_MODEL
def test_any_batch_of_any_length_gives_the_numbers_of_the_model(exported, name):
    model, graph, _ = exported(name)
    for seed, (rows, length) in enumerate([(1, 1), (1, 2), (2, 3), (3, 17), (1, 32), (9, 32)]):
        for inputs in calls(name, batch(rows, length, seed)):
            found = graph(**inputs)
            for output, expected in outputs_of(model, inputs, found).items():
                real = np.ones_like(expected, dtype=bool)
                if "logits" in output:
                    real = inputs["attention_mask"].bool().numpy()
                np.testing.assert_allclose(getattr(found, output).numpy()[real], expected[real], rtol=1e-4, atol=1e-5)


@EACH_MODEL
def test_padding_changes_nothing_whatever_stands_in_it(exported, name):
    _, graph, _ = exported(name)
    alone = batch(1, 7)
    padded = {key: torch.nn.functional.pad(tensor, (0, 9)).repeat(2, 1) for key, tensor in alone.items()}
    padded["input_ids"][0, 7:] = 5
    padded["input_ids"][1, 7:] = torch.arange(9)
    for one, two in zip(calls(name, alone), calls(name, padded), strict=True):
        found, expected = vars(graph(**two)), vars(graph(**one))
        for output, tensor in expected.items():
            rows = found[output][:, :7] if "logits" in output else found[output]
            torch.testing.assert_close(rows, tensor.expand_as(rows), rtol=1e-5, atol=2e-6)


def test_what_is_longer_than_the_positions_is_an_error(exported, capfd):
    for name in ("encoder", "switch reader"):
        _, graph, _ = exported(name)
        with pytest.raises(Exception, match="idx=32 must be within the inclusive range"):
            graph(**calls(name, batch(2, 33))[0])


def test_two_towers_are_two_graphs(exported):
    model, graph, _ = exported("two towers")
    assert set(graph.sessions) == {"query", "passage"}
    query, passage = calls("two towers", batch(2, 5))
    assert not np.allclose(graph(**query).embeddings, graph(**passage).context_embeddings, atol=1e-2)


def test_eight_bits_are_near_and_of_every_matrix_but_the_router(exported, tmp_path):
    for name in ("encoder", "switch reader"):
        model, _, folder = exported(name)
        file = tmp_path / "model.int8.onnx"
        write_int8(folder / f"{name} model.onnx", file)
        assert list(tmp_path.iterdir()) == [file]
        weights = {weight.name: weight for weight in onnx.load(file).graph.initializer}
        matrices = [weight for weight in weights.values() if len(weight.dims) == 2 and min(weight.dims) > 1]
        kinds = {onnx.TensorProto.DataType.Name(matrix.data_type) for matrix in matrices}
        assert kinds == {"INT8", "UINT8"} | ({"DOUBLE"} if "switch" in name else set())
        small = GraphModel({"model": file}, threads=1)
        inputs = calls(name, batch(4, 20))[0]
        found = vars(small(**inputs))
        for output, expected in outputs_of(model, inputs, small(**inputs)).items():
            real = inputs["attention_mask"].bool().numpy() if "logits" in output else ...
            assert np.corrcoef(found[output].numpy()[real].ravel(), expected[real].ravel())[0, 1] > 0.98
            assert not np.array_equal(found[output].numpy(), expected)


@pytest.mark.parametrize("scaling", ["probability", "straight-through"])
@pytest.mark.parametrize("masked", [False, True])
def test_experts_in_the_form_that_is_traced_are_the_experts(scaling, masked, monkeypatch):
    fields = {"router_scaling": scaling, "num_hidden_layers": 1, "n_experts": 4, "num_heads": 2}
    mixture = next(
        module
        for module in tiny_model(mixlm.MixLMSwitchModel, **fields).modules()
        if isinstance(module, SwitchFeedForward)
    )
    hidden = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1.0] * 7, [1.0] * 3 + [0.0] * 4, [0.0] * 7])[..., None] if masked else None
    with torch.no_grad():
        mixture.router.bias[2] = -1e4  # an expert without tokens
        expected, logits = mixture(hidden, mask, PLAIN)
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
        found, other_logits = mixture(hidden, mask, PLAIN)
    assert len(set(logits.argmax(dim=-1).flatten().tolist())) > 1
    torch.testing.assert_close(found, expected)
    assert torch.equal(other_logits, logits)


def test_a_model_is_as_before_after_an_export():
    model = tiny_model(mixlm.MixLMSwitchModel)
    inputs = batch(2, 5)
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        with pytest.raises(KeyboardInterrupt), routers_in_64_bits(model):
            assert any("forward" in vars(module) for module in model.modules())
            raise KeyboardInterrupt
        assert not any("forward" in vars(module) for module in model.modules())
        assert torch.equal(model(**inputs).last_hidden_state, before)
