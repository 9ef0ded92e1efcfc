"""Two rankings made one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlm.retrieval.fusion import fuse, interpolation, reciprocal_rank_fusion
from mixlm.retrieval.hits import PassageHit, best_hits, smaller_row
from mixlm.retrieval.search import WEIGHTS, best_weight

DENSE = [PassageHit(4, 0.9), PassageHit(2, 0.7), PassageHit(7, 0.5)]
LEXICAL = [PassageHit(2, 12.0), PassageHit(9, 6.0), PassageHit(4, 2.0)]


def approx(hits):
    return [PassageHit(row, pytest.approx(score)) for row, score in hits]


def test_reciprocal_ranks_by_hand():
    expected = [(2, 1 / 62 + 1 / 61), (4, 1 / 61 + 1 / 63), (9, 1 / 62), (7, 1 / 63)]
    assert reciprocal_rank_fusion([DENSE, LEXICAL], 10, smaller_row) == approx(expected)
    assert reciprocal_rank_fusion([DENSE, LEXICAL], 2, smaller_row) == approx(expected[:2])


def test_interpolation_by_hand():
    # dense: 4 -> 1, 2 -> 0.5, 7 -> 0; lexical: 2 -> 1, 9 -> 0.4, 4 -> 0
    assert interpolation(DENSE, LEXICAL, 0.3, 10, smaller_row) == approx([(2, 0.85), (4, 0.3), (9, 0.28), (7, 0.0)])
    assert [hit.row for hit in interpolation(DENSE, LEXICAL, 1.0, 2, smaller_row)] == [4, 2]
    assert [hit.row for hit in interpolation(DENSE, LEXICAL, 0.0, 2, smaller_row)] == [2, 9]


def test_a_weight_says_which():
    assert fuse(DENSE, LEXICAL, None, 3, smaller_row) == reciprocal_rank_fusion([DENSE, LEXICAL], 3, smaller_row)
    assert fuse(DENSE, LEXICAL, 0.0, 3, smaller_row) == interpolation(DENSE, LEXICAL, 0.0, 3, smaller_row)


@pytest.mark.parametrize("weight", [None, 0.5])
def test_one_ranking_may_be_empty(weight):
    assert [row for row, _ in fuse(DENSE, [], weight, 10, smaller_row)] == [4, 2, 7]
    assert [row for row, _ in fuse([], LEXICAL, weight, 10, smaller_row)] == [2, 9, 4]
    assert fuse([], [], weight, 10, smaller_row) == []


def test_equal_scores():
    same = [PassageHit(3, 2.0), PassageHit(5, 2.0)]
    assert interpolation(same, [], 0.5, 10, smaller_row) == [(3, 0.5), (5, 0.5)]
    # first here, second there
    turned = [PassageHit(5, 2.0), PassageHit(3, 1.0)]
    assert [row for row, _ in reciprocal_rank_fusion([same, turned], 10, smaller_row)] == [3, 5]


def test_scores_that_single_precision_does_not_tell_apart_are_equal():
    hits = [PassageHit(5, 1.0), PassageHit(3, 1 - 1e-10), PassageHit(9, 0.0)]
    assert interpolation(hits, [], 1.0, 10, smaller_row) == [(3, 1.0), (5, 1.0), (9, 0.0)]


@st.composite
def rankings(draw):
    scores = draw(st.dictionaries(st.integers(0, 12), st.integers(-20, 20), min_size=1))
    return sorted(
        (PassageHit(row, float(score)) for row, score in scores.items()), key=lambda hit: (-hit.score, hit.row)
    )


@given(rankings(), rankings(), st.sampled_from([None, *WEIGHTS]))
def test_what_is_better_in_both_rankings_never_ranks_lower(dense, lexical, weight):
    fused = fuse(dense, lexical, weight, 100, smaller_row)
    assert [row for row, _ in fused] == [row for row, _ in sorted(fused, key=lambda hit: (-hit.score, hit.row))]
    place = {hit.row: rank for rank, hit in enumerate(fused)}
    assert place.keys() == {hit.row for hit in dense + lexical}
    scores = [dict(dense), dict(lexical)]
    common = scores[0].keys() & scores[1].keys()
    for better in common:
        for worse in common:
            if all(of_ranking[better] > of_ranking[worse] for of_ranking in scores):
                assert place[better] < place[worse]


@given(rankings(), rankings(), st.sampled_from([None, *WEIGHTS]), st.integers(1, 5))
def test_the_first_are_the_same_whatever_top_k(dense, lexical, weight, top_k):
    assert fuse(dense, lexical, weight, top_k, smaller_row) == fuse(dense, lexical, weight, 100, smaller_row)[:top_k]


def test_the_best_weight():
    flat = dict.fromkeys((None, *WEIGHTS), 50.0)
    assert best_weight(flat) == 0.5
    assert best_weight({**flat, 0.1: 51.0, 0.8: 51.0}) == 0.8
    assert best_weight({**flat, None: 50.1}) is None


@given(rankings(), st.integers(1, 15))
def test_best_hits(hits, top_k):
    rows, scores = np.array([hit.row for hit in hits]), np.array([hit.score for hit in hits])
    shuffled = np.random.default_rng(0).permutation(len(hits))
    assert best_hits(rows[shuffled], scores[shuffled], top_k, smaller_row) == hits[:top_k]
