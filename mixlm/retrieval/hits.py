"""What a search finds."""

from typing import NamedTuple

import numpy as np


class PassageHit(NamedTuple):
    """A passage, by its row, that was found for a question."""

    row: int
    score: float


def best_hits(rows: np.ndarray, scores: np.ndarray, top_k: int) -> list[PassageHit]:
    """The hits with the best scores, the best first; of equal scores, the one with the smaller row.

    Args:
        rows: of passages, each once, [passages].
        scores: of them, [passages].
        top_k: the most hits.
    """
    if len(rows) > top_k:
        is_good = scores >= np.partition(scores, -top_k)[-top_k]
        rows, scores = rows[is_good], scores[is_good]
    order = np.lexsort((rows, -scores))[:top_k]
    return list(map(PassageHit, rows[order].tolist(), scores[order].tolist()))
