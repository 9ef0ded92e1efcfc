"""Where a reader loses EM and F1: by length and type of the answers, by question word, by kind of error.

An evaluation leaves a line about each question in the run's folder. The report needs these lines alone, and neither
the data nor the model.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple, get_origin

from ..data.json_lines import parse_json
from ..errors import UserError
from .reading_errors import ERROR_KINDS

QUESTIONS_FILE = "questions.jsonl"  # in a run's folder

NO_ANSWER = "none"  # the part of the unanswerable questions where answers are told apart
LONGEST_ANSWER = {"1-2": 2, "3-5": 5, "6-10": 10, "11-20": 20, "21+": math.inf}  # characters
# By what they ask for, in both languages. Whole words where more letters make another one: 누가복음, 왜군, 몇몇.
QUESTION_WORDS = {
    "who": re.compile(r"\b(?:[Ww]ho|[Ww]hom|[Ww]hose|누가)\b|\b(?:누구|누굴)"),
    "what": re.compile(r"\b[Ww]hat\b|\b(?:무엇|무얼|뭐|뭘)"),
    "when": re.compile(r"\b[Ww]hen\b|\b언제"),
    "where": re.compile(r"\b[Ww]here\b|\b어디"),
    "why": re.compile(r"\b(?:[Ww]hy|왜)\b"),
    "how many": re.compile(r"\b[Hh]ow (?:many|much)\b|\b(?:몇(?!몇)|며칠|얼마)"),
    "how": re.compile(r"\b[Hh]ow\b|\b어떻게"),
    "which": re.compile(r"\b(?:[Ww]hich|어느|어떤|어떠한|무슨)\b"),
}
# An apostrophe inside a word, as in O'Brien, is no quotation mark.
_MARKS = re.compile(r"[()\[\]（）［］<>〈〉《》「」『』【】\"“”‘]|(?<!\w)'")


@dataclass(frozen=True)
class JudgedQuestion:
    """A question, its answer and what that is worth by the metric of the run.

    Attributes:
        id: of the question.
        question: what was asked.
        references: the reference answers; none where the question has no answer.
        prediction: the reader's answer; "" for none.
        windows: in how many windows the context was read.
        expressible: whether a span of tokens is a reference; true where the question has no answer.
        exact_match: 0 or 1.
        f1: from 0 to 1.
        error: one of `ERROR_KINDS`, by the normalization of the metric.
    """

    id: str
    question: str
    references: list[str]
    prediction: str
    windows: int
    expressible: bool
    exact_match: float
    f1: float
    error: str


class Scores(NamedTuple):
    """Of some questions: how many, how many of them are expressible, EM and F1; all but the first in percent."""

    questions: int
    expressible: float
    exact_match: float
    f1: float


class Aspect(NamedTuple):
    """A way to part questions.

    Args:
        title: what tells the parts apart.
        part_of: the part of a question, one of `parts`.
        parts: what is in each part, by its name, in the order to show them.
    """

    title: str
    part_of: Callable[[JudgedQuestion], str]
    parts: dict[str, str]


def load_judged(file: Path) -> list[JudgedQuestion]:
    """The questions of a run's last evaluation.

    Raises:
        UserError: the file is not as an evaluation writes it.
    """
    advice = "evaluate again with run_mrc.py, or remove the file"
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte offset {error.start}; {advice}") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    questions = []
    # Not str.splitlines: a question may have a raw U+2028 in it.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        record = parse_json(line, file, number, advice)
        if not _is_judged(record):
            raise UserError(f"{file}, line {number}: not what an evaluation says about a question; {advice}")
        questions.append(JudgedQuestion(**record))
    return questions


def scores_of(questions: Sequence[JudgedQuestion]) -> Scores:
    """What the answers to questions, at least one, are worth on average."""
    columns = zip(*((each.expressible, each.exact_match, each.f1) for each in questions), strict=True)
    return Scores(len(questions), *(100 * sum(column) / len(questions) for column in columns))


def scores_by_part(questions: Sequence[JudgedQuestion], aspect: Aspect) -> dict[str, Scores]:
    """The scores of each part that has questions, by its name; every question is in one part."""
    parts: dict[str, list[JudgedQuestion]] = {name: [] for name in aspect.parts}
    for question in questions:
        parts[aspect.part_of(question)].append(question)
    return {name: scores_of(part) for name, part in parts.items() if part}


def answer_length(question: JudgedQuestion) -> str:
    """How long the first reference is: one of `LONGEST_ANSWER`."""
    if not question.references:
        return NO_ANSWER
    length = len(question.references[0])
    return next(name for name, longest in LONGEST_ANSWER.items() if length <= longest)


def answer_type(question: JudgedQuestion) -> str:
    """What the first reference is written with: marks go before digits, and digits before letters."""
    if not question.references:
        return NO_ANSWER
    answer = question.references[0]
    if _MARKS.search(answer):
        return "marked"
    if any(character.isdigit() for character in answer):
        return "number"
    scripts = {unicodedata.name(character, "?").split()[0] for character in answer if character.isalpha()}
    return {("HANGUL",): "Hangul", ("LATIN",): "Latin"}.get(tuple(scripts), "other")


def question_word(question: JudgedQuestion) -> str:
    """The first of `QUESTION_WORDS` that is in the question, or "other"."""
    places = {
        name: match.start() for name, word in QUESTION_WORDS.items() if (match := word.search(question.question))
    }
    return min(places, key=places.__getitem__, default="other")


def window_count(question: JudgedQuestion) -> str:
    """In how many windows the context was read."""
    return str(question.windows) if question.windows < 4 else "4+"


def error_of(question: JudgedQuestion) -> str:
    """Its kind of error, where those about whether there is an answer are kinds of their own."""
    if question.error != "correct":
        if not question.references:
            return "answered anyway"
        if not question.prediction:
            return "not answered"
    return question.error


ASPECTS = (
    Aspect(
        "question word",
        question_word,
        {
            "who": "누구",
            "what": "무엇",
            "when": "언제",
            "where": "어디",
            "why": "왜",
            "how many": "몇, 얼마, how much",
            "how": "어떻게",
            "which": "어느, 어떤, 무슨",
            "other": "",
        },
    ),
    Aspect(
        "answer length (characters)", answer_length, {**dict.fromkeys(LONGEST_ANSWER, ""), NO_ANSWER: "unanswerable"}
    ),
    Aspect(
        "answer type",
        answer_type,
        {
            "number": "has digits",
            "Hangul": "",
            "Latin": "",
            "marked": "has brackets or quotation marks",
            "other": "other or several scripts",
            NO_ANSWER: "unanswerable",
        },
    ),
    Aspect("windows", window_count, {"1": "", "2": "", "3": "", "4+": ""}),
    Aspect(
        "answer on token borders",
        lambda question: "yes" if question.expressible else "no",
        {
            "yes": "it begins and ends on one",
            "no": "no span of tokens is a reference",
        },
    ),
    Aspect(
        "answerability",
        lambda question: "HasAns" if question.references else "NoAns",
        {
            "HasAns": "the text has an answer",
            "NoAns": "the text has none",
        },
    ),
)
ERRORS = Aspect(
    "error",
    error_of,
    {
        "correct": "",
        "spacing": "blanks apart",
        "particle": "a particle more, less or another",
        "brackets": "a bracketed part more or less",
        "unit": "a unit after the number more or less",
        "not answered": "the text has an answer",
        "answered anyway": "the text has none",
        "other": "",
    },
)


def telling_aspects(questions: Sequence[JudgedQuestion]) -> list[tuple[Aspect, dict[str, Scores]]]:
    """The `ASPECTS` in which these questions differ, each with the scores of its parts."""
    parted = [(aspect, scores_by_part(questions, aspect)) for aspect in ASPECTS]
    return [(aspect, parts) for aspect, parts in parted if len(parts) > 1]


def _is_judged(record: object) -> bool:
    kinds = {field.name: get_origin(field.type) or field.type for field in fields(JudgedQuestion)}
    return (
        isinstance(record, dict)
        and record.keys() == kinds.keys()
        and all(isinstance(record[name], kind) for name, kind in kinds.items())
        and all(isinstance(reference, str) for reference in record["references"])
        and record["windows"] > 0
        and record["error"] in ERROR_KINDS
    )
