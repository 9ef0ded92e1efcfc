"""Exact match (EM) and F1 of machine reading, as SQuAD 1.1, SQuAD 2.0 and KorQuAD 1.0 define them.

An answer is compared with each reference answer of its question, and the best comparison counts. Scores of one answer
are from 0 to 1, scores of a data set are in percent. The definitions are those of the data sets' own evaluation
scripts, with their oddities:

* SQuAD 1.1: Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", 2016.
* SQuAD 2.0: Rajpurkar et al., "Know What You Don't Know: Unanswerable Questions for SQuAD", 2018.
* KorQuAD 1.0: Lim et al., "KorQuAD1.0: Korean QA Dataset for Machine Reading Comprehension", 2019.

What they do not agree on, or leave open, is the same for all here: a question without a prediction scores 0, whatever
its references are, and is counted in `total` and in `missing` (the script of SQuAD 2.0 ends with an error instead).
Predictions for questions that are not asked are ignored.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from ..errors import UserError

_WITHOUT_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_HANGUL = re.compile("[가-힣\u1100-\u11ff]")  # syllables, and their letters in decomposed text
_ENGLISH_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
# These marks separate words, as in 세종(世宗); other ASCII punctuation vanishes without a gap.
_KORQUAD_MARKS_TO_BLANKS = str.maketrans(dict.fromkeys("'\"《》<>〈〉()‘’", " "))


class AnswerScore(NamedTuple):
    """How good one answer is, from 0 to 1."""

    exact_match: float
    f1: float


NOTHING_RIGHT = AnswerScore(0.0, 0.0)


def normalize_squad(text: str) -> str:
    """Lower case, without ASCII punctuation and the articles a, an, the; words are separated by one blank."""
    return " ".join(_ENGLISH_ARTICLE.sub(" ", text.lower().translate(_WITHOUT_ASCII_PUNCTUATION)).split())


def normalize_korquad(text: str) -> str:
    """Lower case, without ASCII punctuation and without 《》〈〉‘’; words are separated by one blank.

    Other marks stay, also “”, 「」, full-width brackets and the middle dot.
    """
    return " ".join(text.translate(_KORQUAD_MARKS_TO_BLANKS).lower().translate(_WITHOUT_ASCII_PUNCTUATION).split())


def exact_match(prediction: str, references: Iterable[str], normalize: Callable[[str], str]) -> float:
    """1.0 if the prediction and one of the references are equal once they are normalized, and else 0.0."""
    return float(normalize(prediction) in map(normalize, references))


def f1(prediction: str, references: Iterable[str], units: Callable[[str], Sequence[str]]) -> float:
    """The harmonic mean of precision and recall over `units` of a text, whatever their order; the best reference's.

    Where there are no units on either side, nothing is in common and F1 is 0.
    """
    predicted = Counter(units(prediction))
    best = 0.0
    for reference in references:
        wanted = Counter(units(reference))
        if common := (predicted & wanted).total():
            best = max(best, 2 * common / (predicted.total() + wanted.total()))
    return best


def squad_words(text: str) -> list[str]:
    """What SQuAD's F1 is made of: the words of the normalized text."""
    return normalize_squad(text).split()


def korquad_characters(text: str) -> str:
    """What KorQuAD's F1 is made of: the characters of the normalized text but the blanks."""
    return normalize_korquad(text).replace(" ", "")


def score_squad_v1(prediction: str, references: Sequence[str]) -> AnswerScore:
    """EM and F1 of one answer by SQuAD 1.1. An answer that is only articles or punctuation has an F1 of 0."""
    return AnswerScore(
        exact_match(prediction, references, normalize_squad),
        f1(prediction, references, squad_words),
    )


def score_squad_v2(prediction: str, references: Sequence[str]) -> AnswerScore:
    """EM and F1 of one answer by SQuAD 2.0; no references: the question has no answer, and only "" is right.

    References that are only articles or punctuation do not count as such.
    """
    references = [reference for reference in references if normalize_squad(reference)]
    if not references:
        right = float(not normalize_squad(prediction))
        return AnswerScore(right, right)
    return score_squad_v1(prediction, references)


def score_korquad_v1(prediction: str, references: Sequence[str]) -> AnswerScore:
    """EM and F1 of one answer by KorQuAD 1.0. An answer that is only punctuation has an F1 of 0."""
    return AnswerScore(
        exact_match(prediction, references, normalize_korquad),
        f1(prediction, references, korquad_characters),
    )


# By the name of a metric.
ANSWER_SCORES = {"korquad_v1": score_korquad_v1, "squad_v1": score_squad_v1}


def usual_metric(contexts: Sequence[str]) -> str:
    """The name of the metric for questions about these texts: KorQuAD's where most of them have Hangul."""
    return "korquad_v1" if 2 * count_korean(contexts) > len(contexts) else "squad_v1"


def count_korean(texts: Iterable[str]) -> int:
    """How many have Hangul."""
    return sum(_HANGUL.search(text) is not None for text in texts)


def squad_v1(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """EM and F1 of a data set by SQuAD 1.1.

    Args:
        predictions: the answer by question id.
        references: the reference answers by question id, at least one each.

    Returns:
        `exact_match` and `f1` in percent, `total`: the number of questions, `missing`: how many have no prediction.

    Raises:
        UserError: there are no questions, or one has no reference answer.
    """
    return _score_answerable(score_squad_v1, predictions, references)


def korquad_v1(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """EM and F1 of a data set by KorQuAD 1.0; arguments, result and errors are those of `squad_v1`."""
    return _score_answerable(score_korquad_v1, predictions, references)


def squad_v2(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    no_answer_scores: Mapping[str, float] | None = None,
    no_answer_threshold: float = 1.0,
) -> dict[str, float]:
    """EM and F1 of a data set with unanswerable questions by SQuAD 2.0.

    Args:
        predictions: the answer by question id, "" where there is none. With `no_answer_scores` this is the best answer
            of each question, also where the model would rather give none.
        references: the reference answers by question id; none for a question that has no answer.
        no_answer_scores: how sure the model is that a question has no answer, by question id: a probability, or the
            score of no answer less the score of the best answer ("null odds").
        no_answer_threshold: an answer with a greater score than this is replaced by "".

    Returns:
        `exact` and `f1` in percent and `total`, the number of questions; the same with `HasAns_` and `NoAns_`, over
        the questions with and without an answer, if there are any; `missing`: how many have no prediction.

        With `no_answer_scores` also `best_exact` and `best_f1`, what the best thresholds would have given, and
        `best_exact_thresh` and `best_f1_thresh`, those thresholds. They are 0.0 where it is best to answer nothing, as
        in the official script; where scores can be negative, that is no threshold to use. As there, questions are
        taken one by one, so that a best threshold may lie between equal scores, in the order of `no_answer_scores`.

    Raises:
        UserError: there are no questions, or a prediction has no number in `no_answer_scores`.
    """
    _require_questions(references)
    answered = [question for question in references if question in predictions]
    scores = {question: score_squad_v2(predictions[question], references[question]) for question in answered}
    has_answer = {question: bool(answers) for question, answers in references.items()}
    final = dict(scores)
    if no_answer_scores is not None:
        for question in answered:
            if math.isnan(no_answer_scores.get(question, math.nan)):
                raise UserError(f"question '{question}' has a prediction, but no number as its no-answer score")
            if no_answer_scores[question] > no_answer_threshold:
                right = float(not has_answer[question])
                final[question] = AnswerScore(right, right)

    parts = {
        "": list(references),
        "HasAns_": [question for question in references if has_answer[question]],
        "NoAns_": [question for question in references if not has_answer[question]],
    }
    result: dict[str, float] = {}
    for prefix, questions in parts.items():
        if questions:
            exact, overlap = _percent(final, questions)
            result |= {f"{prefix}exact": exact, f"{prefix}f1": overlap, f"{prefix}total": len(questions)}
    result["missing"] = len(references) - len(answered)
    if no_answer_scores is not None:
        by_score = sorted(filter(scores.__contains__, no_answer_scores), key=no_answer_scores.__getitem__)
        # Where nothing is answered yet, the questions without an answer are right, unless they are missing.
        right_at_first = sum(not has_answer[question] for question in answered)
        wrong_if_answered = {question: -float(bool(predictions[question])) for question in answered}
        for name, column in (("exact", "exact_match"), ("f1", "f1")):
            gains = {
                question: getattr(scores[question], column) if has_answer[question] else wrong_if_answered[question]
                for question in by_score
            }
            gain, last = _greatest_sum(gains)
            result[f"best_{name}"] = 100 * (right_at_first + gain) / len(references)
            result[f"best_{name}_thresh"] = 0.0 if last is None else no_answer_scores[last]
    return result


def records_by_id(records: Iterable[Mapping], content: Callable[[Mapping], object]) -> dict:
    """`content` of each record by the record's "id", as the functions above take it.

    A record may come more than once, as when several processes fill up their last batches.

    Raises:
        UserError: an id comes with two contents.
    """
    by_id: dict = {}
    for record in records:
        if by_id.setdefault(record["id"], content(record)) != content(record):
            raise UserError(f"question '{record['id']}' comes twice, with different contents")
    return by_id


def _score_answerable(
    score: Callable[[str, Sequence[str]], AnswerScore],
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
) -> dict[str, float]:
    _require_questions(references)
    scores = {}
    for question, answers in references.items():
        if not answers:
            raise UserError(f"question '{question}' has no reference answer; squad_v2 scores unanswerable questions")
        if question in predictions:
            scores[question] = score(predictions[question], answers)
    exact, overlap = _percent(scores, references)
    return {
        "exact_match": exact,
        "f1": overlap,
        "total": len(references),
        "missing": len(references) - len(scores),
    }


def _greatest_sum(gains: Mapping[str, float]) -> tuple[float, str | None]:
    """The greatest sum of the first gains, and the last question of them; 0.0 and None if there is no gain at all."""
    greatest, last, total = 0.0, None, 0.0
    for question, gain in gains.items():
        total += gain
        if total > greatest:
            greatest, last = total, question
    return greatest, last


def _require_questions(references: Mapping[str, Sequence[str]]) -> None:
    if not references:
        raise UserError("there are no questions to score")


def _percent(scores: Mapping[str, AnswerScore], questions: Iterable[str]) -> tuple[float, float]:
    """Mean EM and F1 over the questions, in percent."""
    columns = zip(*(scores.get(question, NOTHING_RIGHT) for question in questions), strict=True)
    exact, overlap = (100 * sum(column) / len(column) for column in columns)
    return exact, overlap
