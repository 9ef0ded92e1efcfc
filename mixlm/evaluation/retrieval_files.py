"""Files of retrieval: hits as TREC runs, relevance judgements as TREC or BEIR write them, queries, BEIR's folders.

All are UTF-8, and may be compressed where their names end in .gz or .xz. Blank lines are passed over.

* TREC: https://github.com/usnistgov/trec_eval
* BEIR: Thakur et al., "BEIR: A Heterogeneous Benchmark for Zero-shot Evaluation of Information Retrieval Models",
  2021; https://github.com/beir-cellar/beir
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..data.corpus import numbered_lines
from ..data.squad import COMPRESSED
from ..errors import UserError
from .retrieval import Hits, ranking

_BEIR_HEADER = ["query-id", "corpus-id", "score"]


class BeirFiles(NamedTuple):
    """The files of a data set in BEIR's layout."""

    corpus: Path
    queries: Path
    qrels: Path


def read_run(file: Path) -> dict[str, list[tuple[str, float]]]:
    """The hits of a TREC run: lines of `query Q0 passage rank score tag`.

    As for trec_eval, scores make the ranking; neither ranks nor the order of the lines say anything.

    Returns:
        Passages with their scores by query id, in the order of the file.

    Raises:
        UserError: the file cannot be read or is empty, a line has not these six fields, a score is not a number, or a
            query has a passage twice.
    """
    hits: dict[str, dict[str, float]] = {}
    for place, line in _lines(file, "hits"):
        fields = line.split()
        if len(fields) != 6:
            raise UserError(f"{place}: {len(fields)} fields, and a hit has six: query Q0 passage rank score tag")
        query, _, passage, _, score, _ = fields
        of_query = hits.setdefault(query, {})
        if passage in of_query:
            raise UserError(f"{place}: passage '{passage}' is a hit of query '{query}' above too; keep the better one")
        of_query[passage] = _score(score, place)
    return {query: list(found.items()) for query, found in hits.items()}


def write_run(file: Path, hits: Hits, tag: str = "mixlm") -> None:
    """Write hits as a TREC run, the best of each query first; `read_run` gives back the same ids and scores.

    Args:
        file: to be written or replaced.
        hits: passages with their scores, by query id; queries without any leave no trace.
        tag: the name of the system.

    Raises:
        UserError: an id or the tag is empty or has a blank in it, a score is not a number, or the file cannot be
            written.
    """
    lines = []
    for query, found in hits.items():
        scores = dict(found)
        for rank, passage in enumerate(ranking(found), start=1):
            lines.append(f"{_word(query)} Q0 {_word(passage)} {rank} {float(scores[passage])!r} {_word(tag)}\n")
    try:
        with COMPRESSED.get(file.suffix, open)(file, "wt", encoding="utf-8", newline="\n") as stream:
            stream.write("".join(lines))
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error


def read_qrels(file: Path) -> dict[str, dict[str, int]]:
    """Relevance judgements, in the form that the first line is in.

    BEIR: the header `query-id corpus-id score`, and then those, separated by tabs. TREC: lines of
    `query 0 passage grade`, separated by blanks.

    Returns:
        The grades of passages by query id; also those of 0 or less, which are not relevant.

    Raises:
        UserError: the file cannot be read or has no judgement, a line has other fields, a grade is not a whole number,
            or a passage has two grades for a query.
    """
    lines = list(_lines(file, "judgements"))
    is_beir = _tab_separated(lines[0][1]) == _BEIR_HEADER
    if is_beir and len(lines) == 1:
        raise UserError(f"{lines[0][0]}: no judgement after the header; is the file whole?")
    judgement = _beir_judgement if is_beir else _trec_judgement
    qrels: dict[str, dict[str, int]] = {}
    for place, line in lines[is_beir:]:
        query, passage, grade = judgement(line, place)
        known = qrels.setdefault(query, {}).setdefault(passage, grade)
        if known != grade:
            raise UserError(
                f"{place}: passage '{passage}' has the grade {grade} for query '{query}', and {known} above; "
                "remove one of them"
            )
    return qrels


def read_queries(file: Path) -> dict[str, str]:
    """Queries, a JSON object a line: its id is "id", or "_id" as BEIR has it, and its text is "text".

    Returns:
        The text by query id.

    Raises:
        UserError: the file cannot be read or has no query, a line is not such an object, or an id comes twice.
    """
    queries: dict[str, str] = {}
    for place, line in _lines(file, "queries"):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: not JSON: {error.msg}; every line must hold one query, as an object") from error
        record = record if isinstance(record, dict) else {}
        query, text = record.get("id", record.get("_id")), record.get("text")
        query = str(query) if type(query) is int else query
        if not (isinstance(query, str) and query and isinstance(text, str) and text.strip()):
            raise UserError(
                f"{place}: found {line.strip():.40} where a query is wanted; "
                'write {"id": "...", "text": "..."}, both not empty'
            )
        if query in queries:
            raise UserError(f"{place}: '{query}' is the id of a query above too; give every query its own")
        queries[query] = text
    return queries


def beir_files(folder: Path, split: str) -> BeirFiles:
    """The files of a split in a BEIR folder: corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv, also compressed.

    Raises:
        UserError: one of them is missing.
    """
    return BeirFiles(
        _present(folder / "corpus.jsonl"),
        _present(folder / "queries.jsonl"),
        _present(folder / "qrels" / f"{split}.tsv"),
    )


def _present(file: Path) -> Path:
    for suffix in ("", *COMPRESSED):
        if (candidate := file.with_name(file.name + suffix)).is_file():
            return candidate
    there = sorted(path.name for path in file.parent.iterdir()) if file.parent.is_dir() else []
    raise UserError(
        f"{file}: no such file (found there: {', '.join(there) or 'nothing'}); "
        "a BEIR folder has corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv"
    )


def _lines(file: Path, content: str) -> Iterator[tuple[str, str]]:
    """The place and the text of each line that is not blank, at least one."""
    empty = True
    for number, line in numbered_lines(file):
        if line.strip():
            empty = False
            yield f"{file}, line {number}", line
    if empty:
        raise UserError(f"{file}: the file has no {content}; is it whole?")


def _tab_separated(line: str) -> list[str]:
    return [field.strip() for field in line.split("\t")]


def _beir_judgement(line: str, place: str) -> tuple[str, str, int]:
    fields = _tab_separated(line)
    if len(fields) != 3 or not all(fields):
        raise UserError(f"{place}: not a query, a passage and a grade, separated by tabs, as the header says")
    query, passage, grade = fields
    return query, passage, _grade(grade, place)


def _trec_judgement(line: str, place: str) -> tuple[str, str, int]:
    fields = line.split()
    if len(fields) != 4:
        raise UserError(
            f"{place}: {len(fields)} fields, and a judgement has four: query 0 passage grade; "
            f"a file of BEIR begins with the header {' '.join(_BEIR_HEADER)}, separated by tabs"
        )
    query, _, passage, grade = fields
    return query, passage, _grade(grade, place)


def _score(text: str, place: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if math.isnan(score):
        raise UserError(f"{place}: the score '{text}' is not a number; a hit is query Q0 passage rank score tag")
    return score


def _grade(text: str, place: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{place}: the grade '{text}' is not a whole number; write 1, or 0 for not relevant") from None


def _word(text: str) -> str:
    if len(text.split()) != 1 or text != text.strip():
        raise UserError(f"'{text}' cannot stand in a TREC run, whose fields are separated by blanks; use another id")
    return text
