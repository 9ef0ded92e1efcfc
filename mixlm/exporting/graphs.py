"""Models as ONNX graphs, and ONNX graphs as models.

An exported folder has `model.onnx`, or for two towers `query.onnx` and `passage.onnx`; beside each, where 8 bits were
asked for, the same name with `.int8.onnx`.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel

from ..data.packages import required
from ..modeling_switch import Router

FLOAT_SUFFIX, INT8_SUFFIX = ".onnx", ".int8.onnx"
# What is in 8 bits: matrix products and tables of embeddings. Convolutions are slower so than in 32 bits.
QUANTIZED = ["MatMul", "Gemm", "Gather"]


class Graph(NamedTuple):
    """What becomes one file: some inputs of a model, and outputs that follow from them.

    Args:
        name: of the file, without suffix.
        inputs: names, of tensors [batch, length].
        outputs: names.
        prefix: what these have in front of them when the model itself is called.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    prefix: str = ""


def graphs_of_encoder(model: PreTrainedModel) -> list[Graph]:
    """The graphs of a model for retrieval: one, or one for each tower."""
    texts, vectors = ("input_ids", "attention_mask"), ("embeddings",)
    if model.config.two_towers:
        return [Graph("query", texts, vectors), Graph("passage", texts, vectors, "context_")]
    return [Graph("model", texts, vectors)]


def graphs_of_reader() -> list[Graph]:
    """The graph of a model for question answering."""
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    return [Graph("model", inputs, ("start_logits", "end_logits"))]


class _Call(nn.Module):
    """A model, called with the inputs of a graph in their order."""

    def __init__(self, model: PreTrainedModel, graph: Graph):
        super().__init__()
        self.model, self.graph = model, graph

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        names = [self.graph.prefix + name for name in self.graph.inputs]
        outputs = self.model(**dict(zip(names, inputs, strict=True)))
        return tuple(outputs[self.graph.prefix + name] for name in self.graph.outputs)


def write_graph(model: PreTrainedModel, graph: Graph, file: Path) -> None:
    """Write a graph whose batch and length are free, up to `max_position_embeddings`.

    Args:
        model: in float32 and evaluation mode.
        graph: of it.
        file: its name.

    Raises:
        UserError: a package is not installed.
    """
    required("onnxscript", "export")
    call = _Call(model, graph).eval()
    # A tensor for each: one that is given twice would be traced as one input.
    example = torch.ones(len(graph.inputs), 2, min(8, model.config.max_position_embeddings), dtype=torch.long)
    shape = {0: Dim("batch"), 1: Dim("length", max=model.config.max_position_embeddings)}
    with _quiet(), routers_in_64_bits(model):
        program = torch.onnx.export(
            call,
            tuple(each.clone() for each in example),
            input_names=graph.inputs,
            output_names=graph.outputs,
            dynamic_shapes=((shape,) * len(graph.inputs),),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        program.save(file)


def write_int8(source: Path, file: Path) -> None:
    """Write a graph in 8 bits: weights beforehand (with 7 of them), activations as they come.

    Args:
        source: the graph in 32 bits.
        file: the new one.

    Raises:
        UserError: a package is not installed.
    """
    quantization = required("onnxruntime.quantization", "export")
    preparation = required("onnxruntime.quantization.shape_inference", "export")
    prepared = file.with_suffix(".prepared")
    with _quiet():
        # Weights that are parts of others, as those of experts are, become weights of their own.
        preparation.quant_pre_process(source, prepared, skip_symbolic_shape=True)
        # Weights of 7 bits: processors without VNNI add pairs of products in 16 bits, which 8 would overflow.
        quantization.quantize_dynamic(
            prepared, file, op_types_to_quantize=QUANTIZED, per_channel=True, reduce_range=True
        )
    prepared.unlink()


@contextmanager
def routers_in_64_bits(model: PreTrainedModel) -> Iterator[None]:
    """Within it, routers compute in 64 bits, which `write_int8` leaves alone: which expert is first must not depend on
    rounding to 8."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router in routers:
        router.forward = partial(_in_64_bits, router)
    try:
        yield
    finally:
        for router in routers:
            del router.forward


def _in_64_bits(router: Router, hidden: Tensor) -> Tensor:
    return F.linear(hidden.double(), router.weight.double(), router.bias.double()).to(hidden.dtype)


class GraphModel:
    """An exported model on the CPU, called with tensors as the model itself is.

    Args:
        files: of its graphs, by their names.
        threads: that compute.

    Raises:
        UserError: a package is not installed.
    """

    def __init__(self, files: Mapping[str, Path], threads: int):
        runtime = required("onnxruntime", "export")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the cores are torch's too
        self.sessions = {
            name: runtime.InferenceSession(file, options, ["CPUExecutionProvider"]) for name, file in files.items()
        }

    def __call__(self, **inputs: Tensor) -> SimpleNamespace:
        """The outputs, tensors too. A model of one tower has one graph for questions and passages."""
        prefix = "context_" if "context_input_ids" in inputs else ""
        session = self.sessions.get("model") or self.sessions["passage" if prefix else "query"]
        outputs = session.run(None, {name.removeprefix(prefix): tensor.numpy() for name, tensor in inputs.items()})
        names = [prefix + output.name for output in session.get_outputs()]
        return SimpleNamespace(**dict(zip(names, map(torch.from_numpy, outputs), strict=True)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it, the exporters keep to themselves what they have to say to their own developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
