"""What an exported model has in common with its source, and how much faster it is."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.batching import evaluation_batches
from ..data.passages import Passage
from ..data.retrieval import EncodedTexts
from ..data.squad import ReadingExample
from ..encoder import MixLMEncoder, vectors_by_number
from ..encoder import in_order as vectors_in_order
from ..reader import INPUTS, MixLMReader, scores_by_window
from ..reader import in_order as scores_in_order

CPU = torch.device("cpu")
BEST = 10  # passages of a question that are compared
ROWS = 16  # of a batch whose time is taken
BATCHES, ROUNDS = 8, 5  # whose time is taken, and how often, after one that is not counted

Model = Callable[..., Any]


def compare_encoders(
    encoder: MixLMEncoder, exported: Model, questions: Sequence[str], passages: Sequence[Passage]
) -> dict[str, float]:
    """Differences of vectors, of what each question would find, and of speed.

    Args:
        encoder: the source, on the CPU.
        exported: called as its model is.
        questions: each searches all passages by inner products.
        passages: to be found.

    Returns:
        `max_difference` between numbers of vectors, and the `largest_value` that these have; `same_best_passage`, the
        share of questions with the same first passage; `same_best_ten`, the share of their first ten that the
        exported model finds among its ten; `speed_of_one_question` and `speed_of_passages`, in batches of 16: how
        many times as fast it is.
    """
    pad_token_id = encoder.tokenizer.pad_token_id
    queries = EncodedTexts(encoder.tokenizer.queries(questions))
    contexts = EncodedTexts(encoder.tokenizer.passages(passages))

    def encode(model: Model) -> list[np.ndarray]:
        return [
            vectors_in_order(vectors_by_number(model, CPU, texts, encoder.batch_size, pad_token_id, are_passages))
            for texts, are_passages in ((queries, False), (contexts, True))
        ]

    vectors, other_vectors = encode(encoder.model), encode(exported)
    best, other_best = (
        np.argsort(-(by_query @ by_passage.T), axis=1, kind="stable")[:, :BEST]
        for by_query, by_passage in (vectors, other_vectors)
    )
    shared = [len(np.intersect1d(own, other)) for own, other in zip(best, other_best, strict=True)]
    texts = ("input_ids", "attention_mask")
    contexts_in_batches = [
        {f"context_{name}": tensor for name, tensor in inputs.items()}
        for inputs in some_batches(contexts, ROWS, pad_token_id, texts)
    ]
    return {
        **differences(vectors, other_vectors),
        "same_best_passage": float(np.mean(best[:, 0] == other_best[:, 0])),
        "same_best_ten": float(np.mean(shared) / best.shape[1]),
        "speed_of_one_question": speed_ratio(encoder.model, exported, some_batches(queries, 1, pad_token_id, texts)),
        "speed_of_passages": speed_ratio(encoder.model, exported, contexts_in_batches),
    }


def compare_readers(reader: MixLMReader, exported: Model, examples: Sequence[ReadingExample]) -> dict[str, float]:
    """Differences of logits, of answers, and of speed.

    Args:
        reader: the source, on the CPU.
        exported: called as its model is.
        examples: what is asked.

    Returns:
        `max_difference` between logits, and the `largest_value` that these have; `same_answer`, the share of
        questions with the same answer; `speed_of_one_window` and `speed_of_windows`, in batches of 16: how many times
        as fast it is.
    """
    pad_token_id = reader.tokenizer.pad_token_id
    windows = reader.decoding.windows(examples, reader.tokenizer)
    scores, other_scores = (
        scores_in_order(windows, scores_by_window(model, CPU, windows, reader.batch_size, pad_token_id))
        for model in (reader.model, exported)
    )
    readings, other_readings = reader.decoding.read(windows, scores), reader.decoding.read(windows, other_scores)
    same = [own.answer.text == other.answer.text for own, other in zip(readings, other_readings, strict=True)]
    return {
        **differences([*scores[0], *scores[1]], [*other_scores[0], *other_scores[1]]),
        "same_answer": float(np.mean(same)),
        "speed_of_one_window": speed_ratio(reader.model, exported, some_batches(windows, 1, pad_token_id, INPUTS)),
        "speed_of_windows": speed_ratio(reader.model, exported, some_batches(windows, ROWS, pad_token_id, INPUTS)),
    }


def differences(arrays: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> dict[str, float]:
    """The largest difference between numbers of the same place, and the largest absolute value of `arrays`."""
    pairs = zip(arrays, others, strict=True)
    return {
        "max_difference": float(max(np.abs(array - other).max() for array, other in pairs)),
        "largest_value": float(max(np.abs(array).max() for array in arrays)),
    }


def some_batches(examples: Dataset, rows: int, pad_token_id: int, names: Sequence[str]) -> list[dict[str, Tensor]]:
    """Inputs of batches of `rows`, of all lengths that there are."""
    batches = [batch for batch, _ in evaluation_batches(examples, rows, pad_token_id)]
    chosen = np.linspace(0, len(batches) - 1, min(BATCHES, len(batches))).astype(np.int64)
    return [{name: batches[number][name] for name in names} for number in chosen]


@torch.inference_mode()
def speed_ratio(model: Model, other: Model, batches: Sequence[dict[str, Tensor]]) -> float:
    """How many times as fast `other` is, by the medians of rounds in which they take turns, batch by batch."""
    seconds: dict[tuple[int, Model], list[float]] = {}
    for _ in range(ROUNDS + 1):
        for number, inputs in enumerate(batches):
            for each in (model, other):
                began = time.perf_counter()
                each(**inputs)
                seconds.setdefault((number, each), []).append(time.perf_counter() - began)
    own, others = (
        sum(statistics.median(seconds[number, each][1:]) for number in range(len(batches))) for each in (model, other)
    )
    return own / others
