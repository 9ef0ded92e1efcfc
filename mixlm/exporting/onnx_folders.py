"""Folders with a model as ONNX, and all else that is needed to use it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import mixlm

from ..data.packages import required
from ..data.passages import Passage
from ..data.retrieval import PassageNumbers
from ..data.squad import ReadingExample, read_squad
from ..encoder import MixLMEncoder
from ..errors import UserError
from ..files import new_folder, write_json
from ..loading import StoredSettings, own_config
from ..reader import MixLMReader
from ..tokenization import load_tokenizer, save_tokenizer
from .graphs import (
    FLOAT_SUFFIX,
    INT8_SUFFIX,
    Graph,
    GraphModel,
    graphs_of_encoder,
    graphs_of_reader,
    write_graph,
    write_int8,
)
from .parity import compare_encoders, compare_readers

SAMPLE = Path(mixlm.__file__).with_name("sample") / "ko_questions.json"
REPORT = "parity.json"

# Exported model -> numbers about it.
Compare = Callable[[GraphModel], dict[str, float]]


def export_onnx(
    name_or_path: str | Path, out: Path, *, int8: bool = False, squad_file: str | Path = SAMPLE
) -> dict[str, Any]:
    """Write a model as ONNX, with its tokenizer, its configuration, its lengths and a report.

    Args:
        name_or_path: what `run_mrc.py` has written becomes a reader; what `run_ict.py` has written, or a pretrained
            model of another head, an encoder.
        out: the new folder.
        int8: also with matrix products in 8 bits.
        squad_file: questions and texts for the report, as SQuAD has them.

    Returns:
        The report, which is also in `parity.json`: the questions, versions and threads, and for each kind of file
        (".onnx", ".int8.onnx") what `compare_encoders` or `compare_readers` have found, and megabytes.

    Raises:
        UserError: the model or the questions cannot be read, a package is not installed, or `out` cannot be written
            or is not empty.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        required(package, "export")
    name = str(name_or_path)
    examples = read_squad(squad_file, to_learn_from=False).examples
    if not examples:
        raise UserError(f"{squad_file}: no questions in it; the exported model is compared by some")
    model, settings, graphs, compare = (_reader if _is_reader(name) else _encoder)(name, examples)
    suffixes = [FLOAT_SUFFIX, INT8_SUFFIX] if int8 else [FLOAT_SUFFIX]
    with new_folder(out) as folder:
        settings.save(folder)
        config = {
            key: value for key, value in model.config.to_dict().items() if key != "auto_map"
        }  # no code goes along
        write_json(folder / "config.json", config)
        save_tokenizer(load_tokenizer(name), folder)
        for graph in graphs:
            write_graph(model, graph, folder / f"{graph.name}{FLOAT_SUFFIX}")
            if int8:
                write_int8(folder / f"{graph.name}{FLOAT_SUFFIX}", folder / f"{graph.name}{INT8_SUFFIX}")
        threads = torch.get_num_threads()
        report: dict[str, Any] = {
            "questions": len(examples),
            "squad_file": Path(squad_file).name,
            "threads": threads,
            "versions": {each: required(each, "export").__version__ for each in ("torch", "onnx", "onnxruntime")},
        }
        for suffix in suffixes:
            size = sum((folder / f"{graph.name}{suffix}").stat().st_size for graph in graphs)
            exported = GraphModel({graph.name: folder / f"{graph.name}{suffix}" for graph in graphs}, threads)
            report[suffix] = {"megabytes": size / 1e6, **compare(exported)}
        write_json(folder / REPORT, report)
    return report


def _is_reader(name: str) -> bool:
    return any(architecture.endswith("ForQuestionAnswering") for architecture in own_config(name).architectures or [])


def _reader(name: str, examples: list[ReadingExample]) -> tuple[PreTrainedModel, StoredSettings, list[Graph], Compare]:
    reader = MixLMReader.from_pretrained(name, device="cpu")
    reader.model.float()
    return (
        reader.model,
        reader.decoding,
        graphs_of_reader(),
        lambda exported: compare_readers(reader, exported, examples),
    )


def _encoder(
    name: str, examples: list[ReadingExample]
) -> tuple[PreTrainedModel, StoredSettings, list[Graph], Compare]:
    encoder = MixLMEncoder.from_pretrained(name, device="cpu")
    encoder.model.float()
    questions = [example.question for example in examples]
    passages = _passages(examples)
    return (
        encoder.model,
        encoder.encoding,
        graphs_of_encoder(encoder.model),
        lambda exported: compare_encoders(encoder, exported, questions, passages),
    )


def _passages(examples: list[ReadingExample]) -> list[Passage]:
    number_of = PassageNumbers()
    for example in examples:
        number_of(example.title, example.context)
    return number_of.passages
