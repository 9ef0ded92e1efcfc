"""Passages to search in: JSON lines, tab-separated files, SQuAD-style files, BEIR's folders and corpora.

Text is handed out as its file has it (that of a corpus in NFC). What can be read:

* `.jsonl`: an object a line, with "id" (BEIR: "_id"), "text" and, if there is one, "title".
* `.tsv`: id, text and, if there is one, title, separated by tabs, as in DPR's psgs_w100.tsv; a header is passed over,
  and a field in quotation marks is taken out of them. No field holds a tab or a line break.
* `.json`: as SQuAD has it. Each paragraph is a passage; its id is FILE-ARTICLE-PARAGRAPH, the name of the file without
  suffixes and two numbers, counted from 0.
* `.dat`: documents, one sentence a line (`mixlm.data.corpus`), cut into windows of whole sentences. The id is
  FILE-LINE-WINDOW: the document's first line, counted from 1, and the window's number in it, counted from 0.
* a folder: its corpus.jsonl, as BEIR has it, or else all its `.dat`, all its `.jsonl` or all its `.tsv` files; FILE is
  then a path in the folder.

All may be compressed: `.gz` or `.xz`. In a FILE, blanks become underscores.
"""

import re
import textwrap
from collections.abc import Iterable, Iterator
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from .corpus import read_documents, visible_files
from .json_lines import read_json_lines
from .squad import read_paragraphs
from .text_files import COMPRESSED, filled_lines, plain_suffix

WINDOW_CHARACTERS = 600  # about a paragraph of an encyclopaedia; of Korean, 200 to 400 tokens

# SQuAD-style files often lie beside a corpus as questions, and are to be named.
_KINDS_IN_FOLDERS = (".dat", ".jsonl", ".tsv")
_TSV_HEADERS = (["id", "text"], ["id", "text", "title"], ["_id", "text"], ["_id", "text", "title"])
_QUOTED = re.compile('"((?:[^"]|"")*)"')


class Passage(NamedTuple):
    """A text to be found: its id has no blanks, and no other passage has it; the title may be ""."""

    id: str
    title: str
    text: str


def read_passages(
    paths: str | PathLike | Iterable[str | PathLike], *, window_characters: int = WINDOW_CHARACTERS
) -> Iterator[Passage]:
    """Stream passages; the forms of files are described at the top of this module.

    Args:
        paths: a file or folder, or several.
        window_characters: the longest passage that is cut out of a document of a corpus.

    Returns:
        The passages, in the order of the files.

    Raises:
        UserError: a path is wrong; a file cannot be read, has no passage or is not what is wanted; a passage has
            neither text nor title; an id is empty, has blanks, or occurs twice.
    """
    if window_characters < 1:
        raise UserError(f"windows of {window_characters} characters: must be 1 or more")
    paths = [paths] if isinstance(paths, str | PathLike) else list(paths)
    hashes = set()  # of the ids: half of the memory of the ids themselves
    for number, (place, passage) in enumerate(_placed_passages(paths, window_characters)):
        _check(passage, place)
        if hash(passage.id) in hashes:  # as good as always that of the same id
            before = islice(_placed_passages(paths, window_characters), number)
            first = next((other_place for other_place, other in before if other.id == passage.id), None)
            if first is not None:
                raise UserError(
                    f"{place}: '{passage.id}' is the id of another passage too ({first}); "
                    "give every passage its own, and every file once"
                )
        hashes.add(hash(passage.id))
        yield passage


def windows(sentences: Iterable[str], max_characters: int) -> Iterator[str]:
    """Pack consecutive sentences, joined by blanks, greedily into texts of up to `max_characters`.

    A longer sentence is cut, between words where that is possible.
    """
    window = ""
    for sentence in sentences:
        pieces = [sentence] if len(sentence) <= max_characters else textwrap.wrap(sentence, max_characters)
        for piece in pieces:
            if window and len(window) + 1 + len(piece) > max_characters:
                yield window
                window = ""
            window += f" {piece}" if window else piece
    if window:
        yield window


def _placed_passages(paths: list[str | PathLike], window_characters: int) -> Iterator[tuple[str, Passage]]:
    """Passages, each with its place for messages: not checked yet."""
    for path in map(Path, paths):
        for file in _files(path):
            name = file.relative_to(path) if path.is_dir() else Path(file.name)
            found = False
            for place, passage in _passages_of(file, _without_suffixes(name), window_characters):
                found = True
                yield place, passage
            if not found:
                raise UserError(f"{file}: the file has no passage; is it whole?")


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; give the passages to search in")
    for suffix in ("", *COMPRESSED):
        if (beir := path / f"corpus.jsonl{suffix}").is_file():
            return [beir]
    by_kind: dict[str, list[Path]] = {}
    for file in visible_files(path):
        if (kind := plain_suffix(file)) in _KINDS_IN_FOLDERS:
            by_kind.setdefault(kind, []).append(file)
    if len(by_kind) > 1:
        found = " and ".join(f"{len(files)} {kind}" for kind, files in sorted(by_kind.items()))
        raise UserError(f"{path}: has {found} files; name those that are passages")
    if not by_kind:
        raise UserError(f"{path}: has no {', '.join(_KINDS_IN_FOLDERS)} file; name the files of passages")
    (files,) = by_kind.values()
    return files


def _without_suffixes(name: Path) -> str:
    """The FILE of an id. What is not UTF-8 in a name, as out of older archives, is escaped."""
    if name.suffix in COMPRESSED:
        name = name.with_suffix("")
    text = name.with_suffix("").as_posix().encode("utf-8", "backslashreplace").decode()
    return re.sub(r"\s", "_", text)


def _passages_of(file: Path, name: str, window_characters: int) -> Iterator[tuple[str, Passage]]:
    match plain_suffix(file):
        case ".jsonl":
            return _json_passages(file)
        case ".tsv":
            return _tsv_passages(file)
        case ".json":
            return _squad_passages(file, name)
        case ".dat":
            return _corpus_passages(file, name, window_characters)
    raise UserError(
        f"{file}: not a file of passages; give .jsonl, .tsv, .json (as SQuAD has it) or .dat, also with "
        f"{' or '.join(COMPRESSED)}, or a folder"
    )


def _json_passages(file: Path) -> Iterator[tuple[str, Passage]]:
    for place, record in read_json_lines(file, "passage"):
        key = "_id" if "_id" in record else "id"
        for field in (key, "text"):
            if field not in record:
                raise UserError(f'{place}: no "{field}" (found there: {", ".join(record) or "nothing"}); add it')
        identifier = str(record[key]) if type(record[key]) is int else record[key]
        passage = Passage(identifier, record.get("title") or "", record["text"])
        for field, value in zip((key, "title", "text"), passage, strict=True):
            if not isinstance(value, str):
                raise UserError(f'{place}: "{field}" is {value!r:.40}; it must be text')
        yield place, passage


def _tsv_passages(file: Path) -> Iterator[tuple[str, Passage]]:
    for count, (number, line) in enumerate(filled_lines(file, "passage")):
        place = f"{file}, line {number}"
        columns = line.rstrip("\r\n").split("\t")
        fields = [_unquoted(column) for column in columns]
        names = [field.lower() for field in fields]
        if count == 0 and names in _TSV_HEADERS:
            continue
        if count == 0 and len({"id", "_id", "text", "title"} & set(names)) > 1:
            raise UserError(f"{place}: the columns are {', '.join(fields)}; give id, text and title, in this order")
        if len(fields) not in (2, 3):
            raise UserError(f"{place}: {len(fields)} columns where id, text and title are wanted, separated by tabs")
        _require_whole_fields(columns, place)
        identifier, text, title = [*fields, ""][:3]
        yield place, Passage(identifier, title, text)


def _squad_passages(file: Path, name: str) -> Iterator[tuple[str, Passage]]:
    for paragraph in read_paragraphs(file):
        place = f"{file}: data[{paragraph.article}].paragraphs[{paragraph.number}]"
        identifier = f"{name}-{paragraph.article}-{paragraph.number}"
        yield place, Passage(identifier, paragraph.title, paragraph.context)


def _corpus_passages(file: Path, name: str, window_characters: int) -> Iterator[tuple[str, Passage]]:
    for document in read_documents(file):
        for number, text in enumerate(windows(document.sentences, window_characters)):
            yield f"{file}, line {document.line}", Passage(f"{name}-{document.line}-{number}", "", text)


def _require_whole_fields(columns: list[str], place: str) -> None:
    """Raise UserError where a field in quotation marks goes on over a tab, or has begun on the line before.

    A text may begin with a quotation mark that has no other: most files have no quoted fields.

    Args:
        columns: of a line, two or three.
    """
    neighbours = (columns[:2], columns[1:3], columns)
    goes_on = any(_QUOTED.fullmatch("\t".join(each)) for each in neighbours if len(each) > 1)
    ends_one = columns[0].endswith('"') and not columns[0].startswith('"')  # the end of a text, and no id
    if goes_on or ends_one:
        raise UserError(
            f"{place}: a quoted field holds a tab or a line break; put a blank there, or write the passages as JSON "
            "lines"
        )


def _unquoted(field: str) -> str:
    quoted = _QUOTED.fullmatch(field)
    return quoted[1].replace('""', '"') if quoted else field


def _check(passage: Passage, place: str) -> None:
    if len(passage.id.split()) != 1 or passage.id != passage.id.strip():
        raise UserError(
            f"{place}: {passage.id!r:.60} cannot be the id of a passage: it is empty or has a blank in it; use another"
        )
    if not passage.text.strip() and not passage.title.strip():
        raise UserError(f"{place}: the text of passage '{passage.id}' is empty; put it there or remove the passage")
