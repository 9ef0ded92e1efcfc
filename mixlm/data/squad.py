"""Questions with their answers out of SQuAD 1.1 and 2.0 and what is written like them, such as KorQuAD 1.0.

Text is taken as it is, never normalized: an answer is a place in its context, and every answer that is handed out is
an exact substring there.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

import numpy as np

from ..errors import UserError
from .json_lines import parse_json, read_json_lines
from .text_files import COMPRESSED, numbered_lines, plain_suffix

READING_SUFFIXES = (".json", ".jsonl")

# Offsets counted in bytes, in UTF-16 units or before blanks were folded are off by a little. An answer that is not
# where its file says is looked for within this many characters, on either side.
NEARBY = 32


@dataclass(frozen=True)
class Answer:
    """A place in a context: `context[start:end] == text`, in characters."""

    text: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclass(frozen=True)
class ReadingExample:
    """A question about a context.

    Attributes:
        id: of the question; no other question of the data has it.
        title: of the article; "" where the file has none.
        context: the text that is read.
        question: what is asked.
        answers: where the context has the answer; the first is the one to learn from. Empty for an unanswerable
            question, and for one whose answers were not found in the context: it cannot be learned from.
        answer_texts: all answers as the file has them, to score predictions with; also those that were not found.
        is_impossible: the context does not answer the question.
        article: number of its article, counted from 0 over all files.
    """

    id: str
    title: str
    context: str
    question: str
    answers: tuple[Answer, ...]
    answer_texts: tuple[str, ...]
    is_impossible: bool
    article: int


@dataclass(frozen=True)
class Paragraph:
    """A text that questions are asked about.

    Attributes:
        title: of its article; "" where the file has none.
        context: the text.
        article: number of its article in the file, counted from 0.
        number: its own number in the article, counted from 0.
    """

    title: str
    context: str
    article: int
    number: int


@dataclass(frozen=True)
class SkippedAnswer:
    """An answer that cannot be learned from: the id of its question, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class ReadingData:
    """What was read.

    Attributes:
        examples: all questions, in the order of the files.
        skipped: the answers that are not in `answers` of their question. What else the question has is kept.
        repaired_answers: how many answers stood elsewhere than their file says, and were found there.
    """

    examples: list[ReadingExample]
    skipped: list[SkippedAnswer]
    repaired_answers: int


def read_squad(paths: str | PathLike | Iterable[str | PathLike], *, to_learn_from: bool = True) -> ReadingData:
    """Read the questions of SQuAD-style files.

    A `.json` file is as SQuAD 1.1 or 2.0 are; of a `.jsonl` file every line is a question with its context, as in
    `read_rows`. Both may be compressed (`.gz`, `.xz`).

    Args:
        paths: a file, a folder that is searched recursively (hidden files are left out), or a list of these.
        to_learn_from: refuse data in which no question has an answer. Otherwise questions need not have `answers`,
            and empty ones are left out: those of files whose answers are hidden.

    Returns:
        The questions. Each entry of `data` is an article; of `.jsonl` files all lines of the same title are one.

    Raises:
        UserError: a path is wrong; a file cannot be read, or is not what is wanted (the message says where); an id
            occurs twice; or no question has an answer to learn from.
    """
    paths = [paths] if isinstance(paths, str | PathLike) else list(paths)
    files = [file for path in paths for file in reading_files(path)]
    collected = _Collector(to_learn_from)
    for file in files:
        if plain_suffix(file) == ".jsonl":
            for place, row in read_json_lines(file, "question"):
                collected.add_row(_Node(row, place))
        else:
            collected.add_articles(_read_document(file))
    return collected.result(", ".join(map(fspath, paths)))


def read_rows(rows: Iterable[Mapping], name: str) -> ReadingData:
    """Take the questions of a `datasets` dataset, or of other rows with the columns of SQuAD there.

    Args:
        rows: mappings with `id`, `context`, `question` and `answers` (two lists `text` and `answer_start`, or a list
            of objects with both). `is_impossible` is optional: without it, a question without answers is
            unanswerable. Rows of the same `title`, or without one, are one article.
        name: of the dataset, for messages.

    Returns:
        The questions.

    Raises:
        UserError: as `read_squad`.
    """
    collected = _Collector(to_learn_from=True)
    for number, row in enumerate(rows):
        collected.add_row(_Node(row, f"{name}, row {number}"))
    return collected.result(name)


def read_paragraphs(file: Path) -> Iterator[Paragraph]:
    """The paragraphs of a `.json` file as SQuAD has it, also those without questions; it may be compressed.

    Raises:
        UserError: the file cannot be read, or is not what is wanted (the message says where).
    """
    for article, article_node in enumerate(_read_document(file)["data"].elements()):
        title = article_node["title"].text() if "title" in article_node else ""
        for number, paragraph in enumerate(article_node["paragraphs"].elements()):
            yield Paragraph(title, _context(paragraph), article, number)


def reading_files(path: str | PathLike) -> list[Path]:
    """The `.json` and `.jsonl` files (also compressed) under `path`: itself, or those of a folder, sorted.

    Raises:
        UserError: it does not exist, or is neither such a file nor a folder with at least one.
    """
    path = Path(path)
    wanted = f"{' and '.join(READING_SUFFIXES)}, also with {' or '.join(COMPRESSED)}"
    if path.is_file():
        if plain_suffix(path) not in READING_SUFFIXES:
            raise UserError(f"{path}: not a file of questions; give one of {wanted}")
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; give SQuAD-style files: {wanted}")
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and plain_suffix(file) in READING_SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise UserError(f"{path}: no file of questions in this folder; put SQuAD-style files there: {wanted}")
    return files


def require_asked(examples: Iterable[ReadingExample], source: str | PathLike) -> None:
    """Raise UserError where a question of `source` is blank: to be asked where questions are answered or searched."""
    for example in examples:
        if not example.question.strip():
            raise UserError(f"{source}: question '{example.id}' is empty; ask something, or remove it")


def count_unanswerable(examples: Iterable[ReadingExample]) -> int:
    """How many questions their context does not answer: more than none is data like SQuAD 2.0."""
    return sum(example.is_impossible for example in examples)


def select_articles(examples: Sequence[ReadingExample], article_range: str) -> list[ReadingExample]:
    """The questions of some articles.

    Args:
        examples: questions.
        article_range: FIRST:LAST as in Python: from 0, without LAST, either may be left out or count from the end.

    Raises:
        UserError: this is no range, or no question is in it.
    """
    match = re.fullmatch(r"\s*([+-]?\d+)?\s*:\s*([+-]?\d+)?\s*", article_range, re.ASCII)
    if match is None:
        raise UserError(
            f'articles "{article_range}": not a range; write FIRST:LAST, such as 0:110, 110: or -30: (a flag needs = '
            "before a hyphen: --articles=-30:)"
        )
    first, last = (int(border) if border else None for border in match.groups())
    articles = 1 + max((example.article for example in examples), default=-1)
    chosen = range(articles)[first:last]
    selected = [example for example in examples if example.article in chosen]
    if not selected:
        raise UserError(
            f'articles "{article_range}": no question is in this range; the data has the articles 0 to {articles - 1}'
        )
    return selected


def split_by_article(
    examples: Sequence[ReadingExample], share: float, seed: int
) -> tuple[list[ReadingExample], list[ReadingExample]]:
    """Hold out some articles. Questions of one article share their contexts, so they are never torn apart.

    Args:
        examples: questions of at least two articles.
        share: of the articles to hold out, between 0 and 1; at least one is, and at least one is not.
        seed: of the choice.

    Returns:
        The other questions, and those that are held out.

    Raises:
        UserError: the share is not between 0 and 1, or there is only one article.
    """
    if not 0 < share < 1:
        raise UserError(f"a share of {share} of the articles cannot be held out; use a number between 0 and 1")
    articles = np.unique([example.article for example in examples])
    if len(articles) < 2:
        raise UserError(
            f"the data has {len(articles)} article(s), of which none can be held out; give a file to evaluate with"
        )
    held_out_count = min(max(1, round(share * len(articles))), len(articles) - 1)
    held_out = set(np.random.default_rng(seed).permutation(articles)[:held_out_count].tolist())
    return (
        [example for example in examples if example.article not in held_out],
        [example for example in examples if example.article in held_out],
    )


@dataclass(frozen=True)
class _Node:
    """A value that knows its place, so that an error can tell it.

    Attributes:
        value: as JSON has it.
        source: the file, and the line where every line is a document of its own.
        path: from there, such as data[3].paragraphs[0].
    """

    value: object
    source: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.source}: {self.path}" if self.path else self.source

    def __contains__(self, key: str) -> bool:
        return key in self._as(Mapping, "an object")

    def __getitem__(self, key: str) -> "_Node":
        values = self._as(Mapping, "an object")
        child = f"{self.path}.{key}" if self.path else key
        if key not in values:
            found = ", ".join(map(str, values)) or "nothing"
            raise UserError(f"{self.source}: {child} is missing (found there: {found}); add it, as SQuAD has it")
        return _Node(values[key], self.source, child)

    def elements(self) -> list["_Node"]:
        values = self._as(list, "a list")
        return [_Node(value, self.source, f"{self.path}[{number}]") for number, value in enumerate(values)]

    def text(self) -> str:
        text = self._as(str, "text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{self}: character {error.start} is half of a surrogate pair ({text[error.start]!a}), which is no "
                "text; write the file again from its source"
            ) from error
        return text

    def number(self) -> int:
        if isinstance(self.value, bool):
            raise self._wrong("a whole number")
        return self._as(int, "a whole number")

    def identifier(self) -> str:
        return self.text() if isinstance(self.value, str) else str(self.number())

    def truth(self) -> bool:
        return self._as(bool, "true or false")

    def _as(self, kind: type, wanted: str):
        if not isinstance(self.value, kind):
            raise self._wrong(wanted)
        return self.value

    def _wrong(self, wanted: str) -> UserError:
        return UserError(f"{self}: found {self.value!r:.40} where {wanted} is wanted; write it as SQuAD has it")


class _Collector:
    """Takes questions in and checks what is the same for every form of file."""

    def __init__(self, to_learn_from: bool):
        self.to_learn_from = to_learn_from
        self.examples: list[ReadingExample] = []
        self.skipped: list[SkippedAnswer] = []
        self.repaired_answers = 0
        self._articles = 0
        self._article_of_title: dict[str, int] = {}  # of rows
        self._place_of_id: dict[str, str] = {}

    def add_articles(self, document: _Node) -> None:
        for article in document["data"].elements():
            title = article["title"].text() if "title" in article else ""
            for paragraph in article["paragraphs"].elements():
                context = _context(paragraph)
                for question in paragraph["qas"].elements():
                    self._add(question, title, context, self._articles)
            self._articles += 1

    def add_row(self, row: _Node) -> None:
        title = row["title"].text() if "title" in row else ""
        if title not in self._article_of_title:
            self._article_of_title[title] = self._articles
            self._articles += 1
        self._add(row, title, _context(row), self._article_of_title[title])

    def result(self, name: str) -> ReadingData:
        if self.to_learn_from and not any(example.answers for example in self.examples):
            raise UserError(
                f"{name}: none of the {len(self.examples)} questions has an answer that is in its context; "
                "give data with answers"
            )
        return ReadingData(self.examples, self.skipped, self.repaired_answers)

    def _add(self, node: _Node, title: str, context: str, article: int) -> None:
        name = node["id"].identifier()
        place = str(node["id"])
        if name in self._place_of_id:
            raise UserError(
                f"{place}: '{name}' is the id of another question too ({self._place_of_id[name]}); "
                "give every question its own, and every file once"
            )
        self._place_of_id[name] = place

        # Some data has plausible answers of unanswerable questions in this place.
        is_impossible = "is_impossible" in node and node["is_impossible"].truth()
        has_none = is_impossible or not (self.to_learn_from or "answers" in node)
        given = [] if has_none else list(_given_answers(node["answers"]))
        if not self.to_learn_from:
            given = [(text, start) for text, start in given if text.text().strip()]
        elif not given and not is_impossible and "is_impossible" in node:
            raise UserError(
                f"{node['answers']}: no answer although is_impossible is false; give an answer or set it to true"
            )
        located = []
        for text_node, start_node in given:
            text, start = text_node.text(), start_node.number()
            if not text.strip():
                raise UserError(f"{text_node}: an empty answer; an unanswerable question has an empty list of answers")
            if not 0 <= start < len(context):
                raise UserError(
                    f"{start_node}: {start} is outside the context of {len(context)} characters; "
                    "count it in characters from the beginning of the context"
                )
            found_at = _locate(context, text, start)
            if found_at is None:
                occurrences = len(_occurrences(context, text))
                self.skipped.append(
                    SkippedAnswer(
                        name,
                        f"the answer {text!r} is not at {start}, where {context[start : start + len(text)]!r} is; "
                        + (f"of {occurrences} elsewhere none is clearly meant" if occurrences else "it is nowhere"),
                    )
                )
                continue
            self.repaired_answers += found_at != start
            located.append(Answer(text, found_at))
        self.examples.append(
            ReadingExample(
                id=name,
                title=title,
                context=context,
                question=node["question"].text(),
                answers=tuple(located),
                answer_texts=tuple(text_node.text() for text_node, _ in given),
                is_impossible=not given,
                article=article,
            )
        )


def _context(node: _Node) -> str:
    context = node["context"].text()
    if not context.strip():
        raise UserError(f"{node['context']}: an empty context; put its text there or remove it with its questions")
    return context


def _given_answers(answers: _Node) -> Iterator[tuple[_Node, _Node]]:
    """Text and start of each answer, out of a list of objects or an object of two lists."""
    if isinstance(answers.value, list):
        for answer in answers.elements():
            yield answer["text"], answer["answer_start"]
        return
    texts, starts = answers["text"].elements(), answers["answer_start"].elements()
    if len(texts) != len(starts):
        raise UserError(f"{answers}: {len(texts)} text and {len(starts)} answer_start; every answer needs both")
    yield from zip(texts, starts, strict=True)


def _locate(context: str, text: str, start: int) -> int | None:
    """Where an answer is: where the file says, or else where it is once nearby."""
    if context.startswith(text, start):
        return start
    nearby = [place for place in _occurrences(context, text) if abs(place - start) <= NEARBY]
    return nearby[0] if len(nearby) == 1 else None


def _occurrences(context: str, text: str) -> list[int]:
    places = []
    place = context.find(text)
    while place >= 0:
        places.append(place)
        place = context.find(text, place + 1)
    return places


def _read_document(file: Path) -> _Node:
    text = "".join(line for _, line in numbered_lines(file))
    advice = "is the file whole? name it .jsonl if every line is a question"
    document = _Node(parse_json(text, file, 1, advice), str(file))
    if not isinstance(document.value, dict) or not isinstance(document.value.get("data"), list):
        raise UserError(
            f"{file}: no list 'data' at the top; give a file like those of SQuAD, or name it .jsonl if every line is "
            "a question"
        )
    return document
