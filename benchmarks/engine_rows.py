"""Rows about the training engine: large ICT batches by gradient caching (arXiv:2101.06983).

Everything is an optimizer step of `InverseClozeObjective` as the training loop makes it: the gradients of all
micro-batches, clipping, AdamW.
"""

from collections.abc import Callable
from functools import partial

import torch
from accelerate import Accelerator
from measure import Result, Row, interleaved, median_ratio, peak_memory
from torch import Tensor

from mixlm import MixLMConfig, MixLMForPreTraining
from mixlm.heads import IGNORE, in_batch_retrieval_loss
from mixlm.profiling import random_batch
from mixlm.training.objectives import Batch, InverseClozeObjective
from mixlm.training.optimization import OptimizerSettings
from mixlm.training.sharding import Engine

PRESET, VOCABULARY = "mixlm-mini", 8000
QUERY_LENGTH, CONTEXT_LENGTH = 32, 128  # tokens
MICRO_BATCH = 32  # rows
MEMORY_BATCH = 512  # rows, in micro-batches
TIME_BATCH = 128  # rows, which fit at once too
TIME_PAIRS = 5

SHAPE = f"{PRESET}, vocabulary {VOCABULARY:,}, query {QUERY_LENGTH}, context {CONTEXT_LENGTH} tokens"


def build_config(dropout: float = 0.0) -> MixLMConfig:
    return MixLMConfig.from_preset(PRESET, vocab_size=VOCABULARY, pretraining_objective="ict", dropout_prob=dropout)


def build_model(dropout: float = 0.0) -> MixLMForPreTraining:
    """The same new model each time, in training mode."""
    torch.manual_seed(0)
    return MixLMForPreTraining(build_config(dropout)).train()


def build_micro_batches(rows: int, rows_of_each: int) -> list[Batch]:
    """The same random `rows` each time, [rows of each, length], cut into micro-batches."""
    torch.manual_seed(0)
    queries, contexts = (random_batch(build_config(), rows, length) for length in (QUERY_LENGTH, CONTEXT_LENGTH))
    batch = queries | {name: tensor for name, tensor in contexts.items() if name.startswith("context_")}
    parts = {name: tensor.split(rows_of_each) for name, tensor in batch.items()}
    return [dict(zip(parts, tensors, strict=True)) for tensors in zip(*parts.values(), strict=True)]


def backward(objective: InverseClozeObjective, micro_batches: list[Batch]) -> None:
    """Add the gradients of a step, as `mixlm.training.loop` does."""
    step = objective.begin_step(micro_batches)
    for number, batch in enumerate(micro_batches):
        loss, _ = objective.loss(batch, number, step)
        loss.backward()


def build_step() -> Callable[[list[Batch]], None]:
    """An optimizer step on a new model, to be called with the step's micro-batches."""
    engine = Engine(build_model(), OptimizerSettings(learning_rate=1e-4, weight_decay=0.01, epsilon=1e-8), "fp32")
    objective = InverseClozeObjective(Accelerator(cpu=True), engine)

    def step(micro_batches: list[Batch]) -> None:
        backward(objective, micro_batches)
        engine.scale_gradients(min(1.0, 1.0 / engine.gradient_norm()))
        engine.step(learning_rate=1e-4)

    return step


def prepare_step(rows: int) -> Callable[[], None]:
    """The work whose memory is measured: a step of `rows` in micro-batches of 32, which is not the model's first.

    AdamW's moments are so there before, as in every step of a run but the first.
    """
    step, micro_batches = build_step(), build_micro_batches(rows, MICRO_BATCH)
    step(micro_batches[:1])
    return partial(step, micro_batches)


def grad_cache_memory() -> list[Result]:
    """Peak memory of an ICT step of 512 rows in micro-batches of 32 / of one of 32 rows"""
    large, small = (peak_memory("engine_rows:prepare_step", rows=rows) for rows in (MEMORY_BATCH, MICRO_BATCH))
    shape = f"{SHAPE}; {large / 2**20:.0f} MiB / {small / 2**20:.0f} MiB"
    return [Result("grad_cache_memory", large / small, "x", "<= 1.5", shape, 1, 1)]


def grad_cache_time() -> list[Result]:
    """CPU time of an ICT step of 128 rows with gradient caching"""
    step = build_step()
    whole = build_micro_batches(TIME_BATCH, TIME_BATCH)
    parts = build_micro_batches(TIME_BATCH, MICRO_BATCH)

    def parts_alone() -> None:
        for part in parts:
            step([part])

    seconds = interleaved(
        {"cached": lambda: step(parts), "whole": lambda: step(whole), "parts alone": parts_alone}, TIME_PAIRS
    )
    shape = f"{SHAPE}; 4 micro-batches of 32 rows"
    return [
        Result(name, median_ratio(seconds["cached"], seconds[other]), "x", target, shape, 1, TIME_PAIRS)
        for name, other, target in (
            ("grad_cache_time", "whole", "<= 1.3"),
            ("grad_cache_time_vs_parts_alone", "parts alone", ""),
        )
    ]


def gradients_of_step(model: MixLMForPreTraining, micro_batches: list[Batch]) -> dict[str, Tensor]:
    """The gradients of a step by name, with gradient caching where there are several micro-batches."""
    torch.manual_seed(1)  # of dropout
    backward(InverseClozeObjective(Accelerator(cpu=True), model), micro_batches)
    return taken_gradients(model)


def gradients_of_one_graph(model: MixLMForPreTraining, micro_batches: list[Batch]) -> dict[str, Tensor]:
    """The same without caching: all micro-batches are kept until one backward pass of the loss over all rows."""
    torch.manual_seed(1)
    outputs = [model(**batch) for batch in micro_batches]
    masked = [
        int((batch["labels"] != IGNORE).sum() + (batch["context_labels"] != IGNORE).sum()) for batch in micro_batches
    ]
    mlm_loss = sum(output.mlm_loss * tokens for output, tokens in zip(outputs, masked, strict=True)) / sum(masked)
    queries = torch.cat([output.embeddings for output in outputs])
    contexts = torch.cat([output.context_embeddings for output in outputs])
    (mlm_loss + in_batch_retrieval_loss(queries, contexts)).backward()
    return taken_gradients(model)


def taken_gradients(model: MixLMForPreTraining) -> dict[str, Tensor]:
    """The gradients by name; the model has none any more."""
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Between any two numbers of the same place."""
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def grad_cache_max_diff() -> list[Result]:
    """Largest absolute difference of a gradient with and without caching"""
    whole = build_micro_batches(TIME_BATCH, TIME_BATCH)
    parts = build_micro_batches(TIME_BATCH, MICRO_BATCH)
    model, double, with_dropout = build_model(), build_model().double(), build_model(dropout=0.1)
    cached, plain = gradients_of_step(model, parts), gradients_of_one_graph(model, parts)
    of_whole = gradients_of_step(model, whole)
    largest = max(float(gradient.abs().max()) for gradient in plain.values())
    differences = {
        "grad_cache_max_diff": largest_difference(cached, plain),
        "grad_cache_max_diff_dropout": largest_difference(
            gradients_of_step(with_dropout, parts), gradients_of_one_graph(with_dropout, parts)
        ),
        "grad_cache_max_diff_whole": largest_difference(cached, of_whole),
        "uncached_max_diff_whole": largest_difference(plain, of_whole),
        "grad_cache_max_diff_whole_fp64": largest_difference(
            gradients_of_step(double, parts), gradients_of_step(double, whole)
        ),
    }
    shape = f"{SHAPE}; 4 micro-batches of 32 rows; the largest gradient is {largest:.2g}"
    targets = {"grad_cache_max_diff": "<= 1e-6"}
    return [Result(name, value, "", targets.get(name, ""), shape, 1, 1) for name, value in differences.items()]


ROWS = [
    Row(("grad_cache_memory",), grad_cache_memory),
    Row(
        ("grad_cache_time", "grad_cache_time_vs_parts_alone"),
        grad_cache_time,
        {
            "grad_cache_time": "ICT step of 128 rows: cached in 4 micro-batches / one batch of 128",
            "grad_cache_time_vs_parts_alone": "the same / four steps of 32 rows, each with its own negatives only",
        },
    ),
    Row(
        (
            "grad_cache_max_diff",
            "grad_cache_max_diff_dropout",
            "grad_cache_max_diff_whole",
            "uncached_max_diff_whole",
            "grad_cache_max_diff_whole_fp64",
        ),
        grad_cache_max_diff,
        {
            "grad_cache_max_diff": "largest absolute difference of a gradient, fp32: cached, and one graph of the "
            "same 4 micro-batches",
            "grad_cache_max_diff_dropout": "the same with dropout 0.1",
            "grad_cache_max_diff_whole": "cached in 4 micro-batches, and one batch of 128: fp32 sums in another order",
            "uncached_max_diff_whole": "one graph of 4 micro-batches, and one batch of 128: that order alone",
            "grad_cache_max_diff_whole_fp64": "cached in 4 micro-batches, and one batch of 128, in float64",
        },
    ),
]
