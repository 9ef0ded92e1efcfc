"""What a search finds."""

from collections.abc import Callable, Iterator, Sequence
from operator import neg
from typing import Any, NamedTuple

import numpy as np


class PassageHit(NamedTuple):
    """A passage, by its row, that was found for a question."""

    row: int
    score: float


class Found(NamedTuple):
    """What a search found for a question.

    Attributes:
        hits: the best first.
        empty_score: the dense score of the passage without text; None where none was asked for by its vector, or the
            encoder was not trained to take unanswerable questions there.
        has_answer: whether the best passage by vectors is above that; None likewise.
    """

    hits: list[PassageHit]
    empty_score: float | None = None
    has_answer: bool | None = None


# What finds passages for each of several questions, at most so many.
Find = Callable[[Sequence[str], int], Iterator[Found]]


# Of equal scores, what is greater by this function of their rows comes first. In an index it is the id, as trec_eval
# has it: a ranking is the same wherever it is looked at. Where there are no ids, the smaller row is first.
Precedence = Callable[[int], Any]
smaller_row: Precedence = neg


def best_hits(rows: np.ndarray, scores: np.ndarray, top_k: int, precedence: Precedence) -> list[PassageHit]:
    """The hits with the best scores, the best first.

    Args:
        rows: of passages, each once, [passages].
        scores: of them, [passages].
        top_k: the most hits.
        precedence: of equal scores.
    """
    if len(rows) > top_k:
        is_good = scores >= np.partition(scores, -top_k)[-top_k]
        rows, scores = rows[is_good], scores[is_good]
    order = np.argsort(-scores, kind="stable")
    hits = list(map(PassageHit, rows[order].tolist(), scores[order].tolist()))
    if len(np.unique(scores)) < len(scores):
        hits.sort(key=lambda hit: (hit.score, precedence(hit.row)), reverse=True)
    return hits[:top_k]
