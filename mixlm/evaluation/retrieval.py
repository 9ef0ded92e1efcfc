"""How good rankings of passages are: accuracy@k, recall@k, MRR, nDCG and MAP, and whether two systems differ.

Hits are `{query id: [(passage id, score), ...]}`, relevance judgements (qrels) `{query id: {passage id: grade}}`; a
grade of 0 or less, and a passage without one, is not relevant. Scores of one query are from 0 to 1, scores of all
queries are in percent. The numbers are those of trec_eval 9 (https://github.com/usnistgov/trec_eval):

* The hits' scores make the ranking, in single precision; of equal ones, the passage with the greater id comes first.
* A query without hits scores 0 and is counted, also among `missing`. So does one for which nothing is relevant. (By
  itself trec_eval leaves out the queries that a run has not; this is its option -c.)
* A query without judgements is left out, and counted in `unjudged`.
"""

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np

from ..errors import UserError

Hits = Mapping[str, Sequence[tuple[str, float]]]
Qrels = Mapping[str, Mapping[str, int]]
Metric = Callable[[Sequence[str], Mapping[str, int]], float]

ACCURACY_CUTOFFS = (1, 5, 10, 20, 100)
RECALL_CUTOFFS = (10, 100)

_RESAMPLES = 10_000
_RESAMPLES_AT_ONCE = 500  # bounds the memory: each is a row as long as there are different values


def accuracy(ranked: Sequence[str], grades: Mapping[str, int], cutoff: int) -> float:
    """1.0 if a relevant passage is among the first `cutoff`, and else 0.0.

    It is top-k accuracy of Karpukhin et al., "Dense Passage Retrieval for Open-Domain Question Answering", 2020, and
    trec_eval's success.

    Args:
        ranked: the ids of the passages found for a query, the best first, each once.
        grades: the grades of the query's passages.
        cutoff: how many passages are looked at.
    """
    return float(any(grades.get(passage, 0) > 0 for passage in ranked[:cutoff]))


def recall(ranked: Sequence[str], grades: Mapping[str, int], cutoff: int) -> float:
    """The share of the relevant passages that are among the first `cutoff`; arguments are those of `accuracy`."""
    relevant = {passage for passage, grade in grades.items() if grade > 0}
    return len(relevant.intersection(ranked[:cutoff])) / len(relevant) if relevant else 0.0


def reciprocal_rank(ranked: Sequence[str], grades: Mapping[str, int], cutoff: int) -> float:
    """1 / rank of the first relevant passage, 0 if it is not among the first `cutoff`.

    Voorhees, "The TREC-8 Question Answering Track Report", 1999. Arguments are those of `accuracy`.
    """
    ranks = (rank for rank, passage in enumerate(ranked[:cutoff], start=1) if grades.get(passage, 0) > 0)
    return 1 / next(ranks, math.inf)


def ndcg(ranked: Sequence[str], grades: Mapping[str, int], cutoff: int) -> float:
    """Discounted gain of the first `cutoff` passages, as a share of the greatest that the judged passages allow.

    The gain is the grade itself (not 2^grade - 1), the discount 1 / log2(rank + 1): Järvelin and Kekäläinen,
    "Cumulated Gain-Based Evaluation of IR Techniques", 2002, as trec_eval computes it. Arguments are those of
    `accuracy`.
    """
    best = _discounted_gain(sorted(grades.values(), reverse=True)[:cutoff])
    return _discounted_gain([grades.get(passage, 0) for passage in ranked[:cutoff]]) / best if best else 0.0


def average_precision(ranked: Sequence[str], grades: Mapping[str, int]) -> float:
    """The mean, over all relevant passages, of the precision at their ranks; 0 for those that were not found.

    Its mean over queries is MAP: Buckley and Voorhees, "Evaluating Evaluation Measure Stability", 2000. Arguments are
    those of `accuracy`.
    """
    relevant = sum(grade > 0 for grade in grades.values())
    precisions = []
    for rank, passage in enumerate(ranked, start=1):
        if grades.get(passage, 0) > 0:
            precisions.append((len(precisions) + 1) / rank)
    return sum(precisions) / relevant if relevant else 0.0


ACCURACIES: dict[str, Metric] = {f"accuracy@{cutoff}": partial(accuracy, cutoff=cutoff) for cutoff in ACCURACY_CUTOFFS}
METRICS: dict[str, Metric] = {
    **ACCURACIES,
    "mrr@10": partial(reciprocal_rank, cutoff=10),
    "ndcg@10": partial(ndcg, cutoff=10),
    "map": average_precision,
    **{f"recall@{cutoff}": partial(recall, cutoff=cutoff) for cutoff in RECALL_CUTOFFS},
}


class PairedDifference(NamedTuple):
    """By how much one system is better than another over the same queries; all but the last in percentage points.

    Attributes:
        mean: the mean difference.
        low, high: its 95% interval.
        p_value: how probable a difference as great as this one is, in either direction, if the systems are alike.
    """

    mean: float
    low: float
    high: float
    p_value: float


def ranking(hits: Sequence[tuple[str, float]]) -> list[str]:
    """The ids of passages, the best score first, in the order in which trec_eval looks at them.

    Raises:
        UserError: a score is not a number (NaN).
    """
    with np.errstate(over="ignore"):  # what is too great for single precision is infinite
        scores = np.array([score for _, score in hits], dtype=np.float64).astype(np.float32)
    if np.isnan(scores).any():
        raise UserError(f"the score of passage '{hits[np.isnan(scores).argmax()][0]}' is not a number (NaN)")
    passages = (passage for passage, _ in hits)
    return [passage for _, passage in sorted(zip(scores.tolist(), passages, strict=True), reverse=True)]


def ranking_scores(hits: Hits, qrels: Qrels, metrics: Mapping[str, Metric] = METRICS) -> dict[str, dict[str, float]]:
    """What the hits of each judged query are worth.

    Args:
        hits: passages with their scores, by query id; no passage twice for a query.
        qrels: the grades of passages, by query id.
        metrics: what to compute, by name.

    Returns:
        By the name of a metric: the score of each query of `qrels`, from 0 to 1.

    Raises:
        UserError: there are no judged queries, or a score is not a number.
    """
    if not qrels:
        raise UserError("there are no judged queries to score")
    scores: dict[str, dict[str, float]] = {name: {} for name in metrics}
    for query, grades in qrels.items():
        ranked = ranking(hits.get(query, ()))
        for name, metric in metrics.items():
            scores[name][query] = metric(ranked, grades)
    return scores


def answer_scores(
    hits: Hits, passages: Mapping[str, str], answers: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """Accuracy where a passage is a hit if it has an answer in its text, whichever passage the question is about.

    This is how open-domain systems, also older ones for KorQuAD, are often scored: Karpukhin et al., 2020. Short
    answers are found by chance too. Both texts are composed to NFC, and their runs of blanks are folded into one. An
    answer may begin or end within a word, as it does before a particle. Case and punctuation count.

    Args:
        hits: passages with their scores, by question id.
        passages: the text of each passage that is a hit, by its id.
        answers: the answers of each question, by its id.

    Returns:
        By the name of an accuracy: the score of each question of `answers`, from 0 to 1.

    Raises:
        UserError: there are no questions, a question has no answer or an empty one, or a hit has no text.
    """

    @cache
    def text_of(passage: str) -> str:
        if passage not in passages:
            raise UserError(f"passage '{passage}' is among the hits and has no text; give the passages of these hits")
        return folded(passages[passage])

    grades = {}
    for question, texts in answers.items():
        wanted = [folded(text) for text in texts]
        if not wanted or not all(wanted):
            raise UserError(f"question '{question}' has no answer or an empty one; leave it out")
        first = ranking(hits.get(question, ()))[: max(ACCURACY_CUTOFFS)]
        grades[question] = {passage: int(any(text in text_of(passage) for text in wanted)) for passage in first}
    return ranking_scores(hits, grades, ACCURACIES)


def mean_percent(scores: Mapping[str, float]) -> float:
    """The mean of the scores of all queries, at least one, in percent."""
    return 100 * math.fsum(scores.values()) / len(scores)


def retrieval_metrics(hits: Hits, qrels: Qrels) -> dict[str, float]:
    """The means of all `METRICS`.

    Args:
        hits: passages with their scores, by query id; no passage twice for a query.
        qrels: the grades of passages, by query id.

    Returns:
        The metrics in percent, and `query_counts`.

    Raises:
        UserError: as `ranking_scores`.
    """
    means = {name: mean_percent(scores) for name, scores in ranking_scores(hits, qrels).items()}
    return {**means, **query_counts(hits, qrels)}


def query_counts(hits: Hits, qrels: Qrels) -> dict[str, int]:
    """How many queries there are.

    Returns:
        `total`: that are judged and scored; of them `missing`: without hits, and `without_relevant`: for which no
        passage is relevant. `unjudged`: with hits and without judgements, left out.
    """
    return {
        "total": len(qrels),
        "missing": sum(not hits.get(query) for query in qrels),
        "without_relevant": sum(all(grade <= 0 for grade in grades.values()) for grades in qrels.values()),
        "unjudged": sum(bool(found) and query not in qrels for query, found in hits.items()),
    }


def paired_difference(scores: Mapping[str, float], others: Mapping[str, float]) -> PairedDifference:
    """Compare two systems by their scores for the same queries.

    The p value is of the two-sided randomization test, in which each query's difference keeps or turns its sign by
    chance: Smucker, Allan and Carterette, "A Comparison of Statistical Significance Tests for Information Retrieval
    Evaluation", 2007. The interval is of the percentile bootstrap: Efron and Tibshirani, "An Introduction to the
    Bootstrap", 1993. Both draw 10,000 times, always the same for the same differences.

    Args:
        scores: of one system by query id, from 0 to 1.
        others: of the other one.

    Returns:
        How much greater `scores` are.

    Raises:
        UserError: there are no queries, or they are not the same.
    """
    if not scores or scores.keys() != others.keys():
        raise UserError("two systems are compared over the same queries, at least one; score both by the same qrels")
    differences = np.array([scores[query] - others[query] for query in scores])
    # Few differences are unlike: how often each of them is drawn says all about a sample of queries. They are rounded
    # so that those that are equal but for the last bits are one.
    values, counts = np.unique(differences.round(12), return_counts=True)
    sizes, size_counts = np.unique(np.abs(differences).round(12), return_counts=True)
    queries = len(differences)
    generator = np.random.default_rng(0)
    totals, turned = [], []
    for _ in range(_RESAMPLES // _RESAMPLES_AT_ONCE):
        totals.append(generator.multinomial(queries, counts / queries, size=_RESAMPLES_AT_ONCE) @ values)
        kept = generator.binomial(size_counts, 0.5, size=(_RESAMPLES_AT_ONCE, len(sizes)))
        turned.append((2 * kept - size_counts) @ sizes)
    low, high = 100 * np.percentile(np.concatenate(totals), (2.5, 97.5)) / queries
    # Sums that are equal may differ in their last bits; the observed one is itself one of the possible ones.
    as_great = np.abs(np.concatenate(turned)) >= abs(counts @ values) - 1e-9
    p_value = (1 + as_great.sum()) / (1 + _RESAMPLES)
    return PairedDifference(float(100 * differences.mean()), float(low), float(high), float(p_value))


def _discounted_gain(grades: Sequence[int]) -> float:
    return sum(max(grade, 0) / math.log2(rank + 1) for rank, grade in enumerate(grades, start=1))


def folded(text: str) -> str:
    """What texts are compared by: composed to NFC, with each run of blanks as one."""
    return " ".join(unicodedata.normalize("NFC", text).split())
