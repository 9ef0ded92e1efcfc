"""Files of retrieval: hits as TREC runs, relevance judgements of TREC, BEIR or SQuAD, queries, BEIR's folders.

All are UTF-8, and may be compressed where their names end in .gz or .xz. Blank lines are passed over.

* TREC: https://github.com/usnistgov/trec_eval
* BEIR: Thakur et al., "BEIR: A Heterogeneous Benchmark for Zero-shot Evaluation of Information Retrieval Models",
  2021; https://github.com/beir-cellar/beir
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..data.json_lines import read_json_lines
from ..data.passages import read_passages
from ..data.squad import read_squad, require_asked, select_articles
from ..data.text_files import COMPRESSED, filled_lines, plain_suffix, write_text
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
        UserError: the file cannot be read, is empty or is named .jsonl, a line has not these six fields, a score is
            not a number, or a query has a passage twice.
    """
    if plain_suffix(file) == ".jsonl":
        raise UserError(f"{file}: JSON lines, and a TREC run is wanted; write one with mixlm search --out NAME.trec")
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


def without_queries_themselves(run: Hits) -> dict[str, list[tuple[str, float]]]:
    """A run without hits that have their query's id: where queries are passages, BEIR's evaluation leaves them out."""
    return {query: [hit for hit in hits if hit[0] != query] for query, hits in run.items()}


def write_run(file: Path, hits: Hits) -> None:
    """Write hits as a TREC run, the best of each query first; `read_run` gives back the same ids and scores.

    Args:
        file: to be written or replaced, once it is whole.
        hits: passages with their scores, by query id; queries without any leave no trace.

    Raises:
        UserError: an id is empty or has a blank in it, a score is not a number, or the file cannot be written.
    """
    require_words(hits)
    lines = []
    for query, found in hits.items():
        scores = dict(found)
        require_words(scores)
        for rank, passage in enumerate(ranking(found), start=1):
            lines.append(f"{query} Q0 {passage} {rank} {float(scores[passage])!r} mixlm\n")
    write_text(file, lines)


def require_words(ids: Iterable[str]) -> None:
    """Raise UserError where an id cannot stand in a TREC run; to be asked before a long search."""
    for text in ids:
        if len(text.split()) != 1 or text != text.strip():
            raise UserError(
                f"'{text}' cannot stand in a TREC run, whose fields are separated by blanks; use another id"
            )


def read_qrels(file: Path) -> dict[str, dict[str, int]]:
    """Relevance judgements, in the form that the first line is in.

    BEIR: the header `query-id corpus-id score`, and then those, separated by tabs. TREC: lines of
    `query 0 passage grade`, separated by blanks.

    Returns:
        The grades of passages by query id; also those of 0 or less, which are not relevant.

    Raises:
        UserError: the file cannot be read, has no judgement or is named .jsonl, a line has other fields, a grade is
            not a whole number, or a passage has two grades for a query.
    """
    if plain_suffix(file) == ".jsonl":
        raise UserError(
            f"{file}: JSON lines, and judgements are TREC's or BEIR's, or a SQuAD-style file, whose name ends in .json"
        )
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


class SquadJudgements(NamedTuple):
    """Relevance judgements of questions that have an answer, and the answers by question id."""

    qrels: dict[str, dict[str, int]]
    answers: dict[str, tuple[str, ...]]


def read_squad_judgements(file: Path, articles: str | None = None) -> SquadJudgements:
    """Judge by a SQuAD-style .json file: relevant is the paragraph of a question, by its id in `read_passages`.

    Where the same paragraph is in the file twice, both are relevant. Questions without an answer are left out.

    Args:
        file: also .gz or .xz.
        articles: FIRST:LAST, see `select_articles`; None is all.

    Raises:
        UserError: the file cannot be read or is not like that, or no question is in the articles or has an answer.
    """
    ids: dict[tuple[str, str], list[str]] = defaultdict(list)
    for passage in read_passages(file):
        ids[passage.title, passage.text].append(passage.id)
    examples = read_squad(file, to_learn_from=False).examples
    if articles is not None:
        examples = select_articles(examples, articles)
    answerable = [example for example in examples if not example.is_impossible]
    if not answerable:
        raise UserError(f"{file}: none of {len(examples)} questions has an answer; give questions with answers")
    return SquadJudgements(
        {example.id: dict.fromkeys(ids[example.title, example.context], 1) for example in answerable},
        {example.id: example.answer_texts for example in answerable},
    )


def is_squad(file: Path) -> bool:
    """Whether a file of questions or judgements is taken to be as SQuAD's are, by its name."""
    return plain_suffix(file) == ".json"


def read_queries(file: Path) -> dict[str, str]:
    """Queries: the questions of a SQuAD-style .json file, or else JSON lines with "id" (BEIR: "_id") and "text".

    Returns:
        The text by query id.

    Raises:
        UserError: the file cannot be read or has no query, a line is not such an object, a question is blank, or an
            id comes twice.
    """
    if is_squad(file):
        examples = read_squad(file, to_learn_from=False).examples
        require_asked(examples, file)
        return {example.id: example.question for example in examples}
    queries: dict[str, str] = {}
    for place, record in read_json_lines(file, "query"):
        query, text = record.get("id", record.get("_id")), record.get("text")
        query = str(query) if type(query) is int else query
        if not (isinstance(query, str) and query and isinstance(text, str) and text.strip()):
            raise UserError(
                f"{place}: found {json.dumps(record, ensure_ascii=False):.40} where a query is wanted; "
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
    return ((f"{file}, line {number}", line) for number, line in filled_lines(file, content))


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
