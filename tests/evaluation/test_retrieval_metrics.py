"""Metrics of retrieval against numbers worked out by hand and against trec_eval's own code."""

import math
import warnings
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlm.errors import UserError
from mixlm.evaluation.retrieval import (
    METRICS,
    PairedDifference,
    accuracy,
    answer_scores,
    average_precision,
    mean_percent,
    ndcg,
    paired_difference,
    query_counts,
    ranking,
    ranking_scores,
    recall,
    reciprocal_rank,
    retrieval_metrics,
)

PROPERTY = settings(derandomize=True, deadline=None, database=None, max_examples=100)

PASSAGES = [f"p{number}" for number in range(14)] + ["가", "힣", "😀"]
# Few scores, so that ties come up, and some that are ties in single precision alone.
SCORES = st.sampled_from([0.0, -1.0, 1.0, 1 + 1e-9, 1 - 1e-9, 2.5, 1e39])
HITS = st.dictionaries(st.sampled_from(PASSAGES), SCORES, max_size=len(PASSAGES)).map(
    lambda found: list(found.items())
)
# Not less than -1: trec_eval's own code ends with a segmentation fault where all grades of a query are.
GRADES = st.dictionaries(st.sampled_from(PASSAGES), st.integers(-1, 3), min_size=1)
QUERIES = st.sampled_from("abcdef")
MANY_HITS = st.dictionaries(QUERIES, HITS)
QRELS = st.dictionaries(QUERIES, GRADES, min_size=1)


class TestByHand:
    RANKED = ["x", "b", "y", "a", "z"]
    GRADED = {"a": 3, "b": 1, "c": 2, "x": 0, "y": -1}

    def test_accuracy(self):
        assert [accuracy(self.RANKED, self.GRADED, cutoff) for cutoff in (1, 2, 100)] == [0.0, 1.0, 1.0]

    def test_recall(self):
        assert [recall(self.RANKED, self.GRADED, cutoff) for cutoff in (1, 2, 4, 100)] == [0, 1 / 3, 2 / 3, 2 / 3]

    def test_reciprocal_rank(self):
        assert reciprocal_rank(self.RANKED, self.GRADED, 10) == 0.5
        assert reciprocal_rank(self.RANKED, self.GRADED, 1) == 0.0

    def test_ndcg_gains_grades(self):
        best = 3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4)
        assert ndcg(self.RANKED, self.GRADED, 10) == pytest.approx((1 / math.log2(3) + 3 / math.log2(5)) / best)
        assert ndcg(["a", "c", "b"], self.GRADED, 10) == 1.0
        assert ndcg(["a", "x"], self.GRADED, 1) == 1.0  # the best of one passage, not of all

    def test_average_precision(self):
        assert average_precision(self.RANKED, self.GRADED) == pytest.approx((1 / 2 + 2 / 4 + 0) / 3)

    @pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
    def test_nothing_relevant_or_nothing_found_is_0(self, metric):
        assert metric(["a", "b"], {"a": 0, "b": -1}) == metric([], {"a": 1}) == 0.0

    def test_a_little_set_in_percent(self):
        hits = {
            "1": [("a", 1.0), ("b", 3.0), ("c", 2.0)],  # relevant at rank 1
            "2": [("b", 9.0), ("a", 8.0)],  # at rank 2
            "3": [],
            "5": [("a", 1.0)],
            "6": [],  # neither judged nor found
        }
        qrels = {"1": {"b": 1}, "2": {"a": 1}, "3": {"a": 1}, "4": {"a": 0}}
        found = retrieval_metrics(hits, qrels)
        assert (found["accuracy@1"], found["accuracy@5"], found["mrr@10"], found["map"]) == (25.0, 50.0, 37.5, 37.5)
        assert found["recall@10"] == 50.0
        assert found["ndcg@10"] == pytest.approx(25 * (1 + 1 / math.log2(3)))
        counts = {"total": 4, "missing": 2, "without_relevant": 1, "unjudged": 1}
        assert found.items() >= counts.items() and query_counts(hits, qrels) == counts

    def test_no_judged_queries(self):
        with pytest.raises(UserError, match="no judged queries"):
            ranking_scores({"1": [("a", 1.0)]}, {})


class TestRanking:
    def test_ties_are_broken_by_the_greater_id(self):
        assert ranking([("a", 1.0), ("c", 1.0), ("b", 2.0), ("가", 1.0)]) == ["b", "가", "c", "a"]

    def test_scores_that_single_precision_does_not_tell_apart_are_ties(self):
        assert ranking([("a", 1 + 1e-9), ("b", 1.0)]) == ["b", "a"]
        with warnings.catch_warnings(action="error"):
            assert ranking([("a", 1e300), ("b", 1e200)]) == ["b", "a"]

    def test_not_a_number(self):
        with pytest.raises(UserError, match=r"'b' is not a number \(NaN\)"):
            ranking([("a", 1.0), ("b", math.nan)])


@PROPERTY
@given(hits=MANY_HITS, qrels=QRELS)
def test_trec_eval_says_the_same(hits, qrels):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    names = {f"accuracy@{cutoff}": f"success_{cutoff}" for cutoff in (1, 5, 10, 20, 100)}
    names |= {"recall@10": "recall_10", "recall@100": "recall_100", "ndcg@10": "ndcg_cut_10", "map": "map"}
    measures = {"success.1,5,10,20,100", "recall.10,100", "ndcg_cut.10", "map", "recip_rank"}
    official = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(
        {query: dict(found) for query, found in hits.items()}
    )
    scores = ranking_scores(hits, qrels)
    for query in qrels:
        expected = official.get(query)
        for name, theirs in names.items():
            assert scores[name][query] == pytest.approx(expected[theirs] if expected else 0.0), name
        reciprocal = expected["recip_rank"] if expected else 0.0
        assert scores["mrr@10"][query] == pytest.approx(reciprocal if reciprocal >= 1 / 10 else 0.0)


@PROPERTY
@given(hits=MANY_HITS, qrels=QRELS)
def test_metrics_are_in_range_and_grow_with_their_cutoff(hits, qrels):
    found = retrieval_metrics(hits, qrels)
    assert all(0 <= found[name] <= 100 + 1e-9 for name in METRICS)
    assert found["accuracy@1"] <= found["accuracy@5"] <= found["accuracy@10"] <= found["accuracy@100"]
    assert found["accuracy@1"] <= found["mrr@10"] + 1e-9 and found["mrr@10"] <= found["accuracy@10"] + 1e-9
    assert found["recall@10"] <= found["recall@100"]


@PROPERTY
@given(hits=MANY_HITS, qrels=QRELS, random=st.randoms(use_true_random=False))
def test_no_order_changes_anything(hits, qrels, random):
    shuffled_hits = {
        query: random.sample(hits[query], len(hits[query])) for query in random.sample([*hits], len(hits))
    }
    shuffled_qrels = {query: qrels[query] for query in random.sample([*qrels], len(qrels))}
    found = retrieval_metrics(hits, qrels)
    assert retrieval_metrics(shuffled_hits, shuffled_qrels) == pytest.approx(found, abs=1e-9)


@PROPERTY
@given(ranked=st.permutations(PASSAGES), grades=GRADES, data=st.data())
def test_a_better_rank_of_a_better_passage_lowers_nothing(ranked, grades, data):
    lower = data.draw(st.integers(1, len(ranked) - 1))
    upper = data.draw(st.integers(0, lower - 1))
    if grades.get(ranked[lower], 0) < grades.get(ranked[upper], 0):
        return
    better = list(ranked)
    better[upper], better[lower] = ranked[lower], ranked[upper]
    for metric in METRICS.values():
        assert metric(better, grades) >= metric(ranked, grades) - 1e-12


class TestAnswerScores:
    PASSAGES = {"a": "세종은 1397년에\n태어났다.", "b": "서울의 옛 이름은 한양이다.", "c": "Seoul"}

    def test_by_hand(self):
        hits = {"1": [("b", 2.0), ("a", 1.0)], "2": [("b", 1.0)], "3": [("c", 1.0)]}
        answers = {"1": ["1397년에 태어났다"], "2": ["경성", "한양"], "3": ["seoul"], "4": ["없음"]}
        scores = answer_scores(hits, self.PASSAGES, answers)
        assert scores["accuracy@1"] == {"1": 0.0, "2": 1.0, "3": 0.0, "4": 0.0}
        assert scores["accuracy@5"] == {"1": 1.0, "2": 1.0, "3": 0.0, "4": 0.0}
        assert mean_percent(scores["accuracy@5"]) == 50.0
        assert all(name.startswith("accuracy@") for name in scores)

    def test_each_cutoff_has_its_hits(self):
        texts = {f"{rank:03}": "한양" if rank == 77 else "서울" for rank in range(1, 120)}
        hits = {"1": [(passage, -float(passage)) for passage in texts]}
        scores = answer_scores(hits, texts, {"1": ["한양"]})
        assert {name: of_name["1"] for name, of_name in scores.items()} == {
            **dict.fromkeys(("accuracy@1", "accuracy@5", "accuracy@10", "accuracy@20"), 0.0),
            "accuracy@100": 1.0,
        }

    def test_hangul_written_as_its_letters_is_the_same(self):
        decomposed = "\u1112\u1161\u11ab\u110b\u1163\u11bc"
        assert decomposed != "한양"
        assert answer_scores({"1": [("b", 1.0)]}, self.PASSAGES, {"1": [decomposed]})["accuracy@1"] == {"1": 1.0}

    def test_errors(self):
        with pytest.raises(UserError, match="passage 'z' is among the hits and has no text"):
            answer_scores({"1": [("z", 1.0)]}, self.PASSAGES, {"1": ["한양"]})
        for nothing in ([], [" "], ["한양", ""]):
            with pytest.raises(UserError, match="question '1' has no answer or an empty one"):
                answer_scores({}, self.PASSAGES, {"1": nothing})
        with pytest.raises(UserError, match="no judged queries"):
            answer_scores({}, self.PASSAGES, {})


def scores_of(*values: float) -> dict[str, float]:
    return {str(number): value for number, value in enumerate(values)}


class TestPairedDifference:
    def test_equal_systems_do_not_differ(self):
        assert paired_difference(scores_of(0.5, 1.0), scores_of(0.5, 1.0)) == PairedDifference(0.0, 0.0, 0.0, 1.0)

    def test_the_same_gain_everywhere_has_no_width(self):
        found = paired_difference(scores_of(*[0.75] * 40), scores_of(*[0.5] * 40))
        assert found == PairedDifference(25.0, 25.0, 25.0, 1 / 10_001)

    def test_p_value_is_that_of_all_sign_flips(self):
        """Of few queries all flips can be tried, and the resamples have to say about the same."""
        differences = (0.5, 0.25, 0.1, 0.3, 0.2, -0.15, 0.3, 0.05, 0.0)
        flips = [
            sum(sign * value for sign, value in zip(signs, differences, strict=True))
            for signs in product((1, -1), repeat=len(differences))
        ]
        exact = sum(abs(flip) >= sum(differences) - 1e-9 for flip in flips) / len(flips)
        found = paired_difference(scores_of(*differences), scores_of(*[0.0] * len(differences)))
        assert found.p_value == pytest.approx(exact, abs=0.01) and 0.01 < exact < 0.05

    def test_interval_is_that_of_the_normal_distribution_for_many_queries(self):
        found = paired_difference(scores_of(*[1.0] * 600, *[0.0] * 400), scores_of(*[0.5] * 1000))
        half = 1.96 * 100 * 0.5 * math.sqrt(4 * 0.6 * 0.4 / 1000)
        assert found.mean == pytest.approx(10.0)
        assert found[1:3] == pytest.approx((10 - half, 10 + half), abs=0.2)

    @settings(PROPERTY, max_examples=30)
    @given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8))
    def test_order_of_the_systems_and_of_the_queries(self, pairs):
        first, second = (scores_of(*column) for column in zip(*pairs, strict=True))
        there, back = paired_difference(first, second), paired_difference(second, first)
        assert there.mean == pytest.approx(-back.mean)
        assert there.p_value == pytest.approx(back.p_value, abs=0.03)
        assert 0 < there.p_value <= 1 and there.low <= there.mean + 1e-9 and there.mean <= there.high + 1e-9
        turned = paired_difference(dict(reversed(first.items())), second)
        assert turned == pytest.approx(there)

    def test_errors(self):
        for first, second in (({}, {}), (scores_of(1.0), {}), (scores_of(1.0), {"other": 1.0})):
            with pytest.raises(UserError, match="over the same queries"):
                paired_difference(first, second)
