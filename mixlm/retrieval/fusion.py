"""Two rankings of passages, by vectors and by terms, made one."""

from collections.abc import Mapping, Sequence

import numpy as np

from .hits import PassageHit, Precedence, best_hits

RANK_CONSTANT = 60


def fuse(
    dense: Sequence[PassageHit],
    lexical: Sequence[PassageHit],
    weight: float | None,
    top_k: int,
    precedence: Precedence,
) -> list[PassageHit]:
    """`interpolation` by a weight, or `reciprocal_rank_fusion` where there is none."""
    if weight is None:
        return reciprocal_rank_fusion([dense, lexical], top_k, precedence)
    return interpolation(dense, lexical, weight, top_k, precedence)


def reciprocal_rank_fusion(
    rankings: Sequence[Sequence[PassageHit]], top_k: int, precedence: Precedence
) -> list[PassageHit]:
    """The best passages by the sum, over the rankings that have a passage, of 1 / (60 + its rank there).

    Ranks count from 1; the scores in the rankings do not matter. Cormack, Clarke and Büttcher, "Reciprocal Rank Fusion
    Outperforms Condorcet and Individual Rank Learning Methods", 2009.

    Args:
        rankings: hits, the best first.
        top_k: the most hits.
        precedence: of equal scores.
    """
    scores: dict[int, float] = {}
    for hits in rankings:
        for rank, hit in enumerate(hits, start=1):
            scores[hit.row] = scores.get(hit.row, 0.0) + 1 / (RANK_CONSTANT + rank)
    return _best(scores, top_k, precedence)


def interpolation(
    dense: Sequence[PassageHit],
    lexical: Sequence[PassageHit],
    weight: float,
    top_k: int,
    precedence: Precedence,
) -> list[PassageHit]:
    """The best passages by weight * dense score + (1 - weight) * lexical score.

    Scores of a ranking are first laid between 0, its worst, and 1, its best; a passage that it has not counts as its
    worst. Bruch, Gai and Ingber, "An Analysis of Fusion Functions for Hybrid Retrieval", 2023, section 4.

    Args:
        dense, lexical: hits, the best first.
        weight: of the dense score, from 0 to 1.
        top_k: the most hits.
        precedence: of equal scores.
    """
    by_vectors, by_terms = normalised(dense), normalised(lexical)
    rows = by_vectors.keys() | by_terms.keys()
    scores = {row: weight * by_vectors.get(row, 0.0) + (1 - weight) * by_terms.get(row, 0.0) for row in rows}
    return _best(scores, top_k, precedence)


def normalised(hits: Sequence[PassageHit]) -> dict[int, float]:
    """Scores by row, from 0 to 1; where all are equal, 1."""
    if not hits:
        return {}
    best, worst = hits[0].score, hits[-1].score
    if best == worst:
        return {hit.row: 1.0 for hit in hits}
    return {hit.row: (hit.score - worst) / (best - worst) for hit in hits}


def _best(scores: Mapping[int, float], top_k: int, precedence: Precedence) -> list[PassageHit]:
    # In single precision, in which trec_eval compares scores.
    rows, values = np.array([*scores], dtype=np.int64), np.array([*scores.values()], dtype=np.float32)
    return best_hits(rows, values, top_k, precedence)
