"""How good answers from a collection are, and whose errors the wrong ones are."""

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from .reading import NOTHING_RIGHT, AnswerScore
from .retrieval import folded

Fault = Literal["retriever", "reader", "choice"]


@dataclass(frozen=True)
class JudgedAnswer:
    """What the answer to one question is worth.

    Args:
        exact_match, f1: from 0 to 1.
        first_hit: the rank, from 1, of the first passage that has an answer in its text; None if none has.
        fault: whose error a wrong answer is. The retriever's: no passage has an answer in its text. The reader's: one
            has, and of no passage the right answer was read. Of the choice among them: of one it was, and another
            answer, or none, was given; also where there is no answer and one was given. None: it is right.
        is_answerable: whether there are references, and not "no answer" is right.
    """

    exact_match: float
    f1: float
    first_hit: int | None
    fault: Fault | None
    is_answerable: bool = True


def score_open_answer(
    answer: str, references: Sequence[str], score: Callable[[str, Sequence[str]], AnswerScore]
) -> AnswerScore:
    """As `score`, which knows answers alone; where there are no references, "" is right.

    What is compared is composed to NFC: the answer is from a passage, whose file may have another form than the
    reference's.
    """
    if references:
        return score(_composed(answer), [_composed(reference) for reference in references])
    return NOTHING_RIGHT if answer else AnswerScore(1.0, 1.0)


def judge_answer(
    answer: str,
    candidates: Sequence[tuple[str, str]],
    references: Sequence[str],
    score: Callable[[str, Sequence[str]], AnswerScore],
) -> JudgedAnswer:
    """Judge the answer to a question.

    Args:
        answer: "" for "no answer".
        candidates: of each passage, in the order in which they were found, its text and the answer that was read.
        references: right answers; none where the question has no answer.
        score: of an answer and references, such as `score_korquad_v1`.
    """
    exact_match, f1 = score_open_answer(answer, references, score)
    wanted = [folded(reference) for reference in references]
    texts = [folded(text) for text, _ in candidates]
    has_answer = [any(each in text for each in wanted) for text in texts]
    first_hit = has_answer.index(True) + 1 if any(has_answer) else None
    fault: Fault | None = None
    if not exact_match:
        was_read = any(score_open_answer(read, references, score).exact_match for _, read in candidates)
        fault = "choice" if was_read or not references else "reader" if first_hit else "retriever"
    return JudgedAnswer(exact_match, f1, first_hit, fault, is_answerable=bool(references))


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def open_qa_metrics(judged: Sequence[JudgedAnswer], top_k: int) -> dict[str, float]:
    """Means over all questions, in percent: `exact_match`, `f1`, and the share that is the fault of each part.

    Over those that have an answer, if there are any, also `hits@k`: it is in the text of one of the first k passages.

    Args:
        judged: at least one.
        top_k: how many passages were read.
    """

    def percent(values: Sequence[float]) -> float:
        return 100 * sum(values) / len(values)

    ranks = [each.first_hit or math.inf for each in judged if each.is_answerable]
    cutoffs = sorted({cutoff for cutoff in (1, 5, 10, 20) if cutoff < top_k} | {top_k}) if ranks else []
    return {
        "exact_match": percent([each.exact_match for each in judged]),
        "f1": percent([each.f1 for each in judged]),
        **{f"hits@{cutoff}": percent([rank <= cutoff for rank in ranks]) for cutoff in cutoffs},
        **{f"fault_of_{part}": percent([each.fault == part for each in judged]) for part in get_args(Fault)},
    }
