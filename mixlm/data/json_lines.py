"""JSON in text files: an object a line, or one document; whatever is wrong is named with its place."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line
from .text_files import filled_lines


def read_json_lines(file: Path, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stream the objects of a file that has one a line. Blank lines are passed over.

    Args:
        file: UTF-8, also .gz or .xz.
        content: what an object is, for messages: "passage".

    Returns:
        The place of each object, FILE, line N, for messages, and the object.

    Raises:
        UserError: the file cannot be read, or has no object; a line is not JSON, is no object, or has half of a
            surrogate pair in it, which is no text.
    """
    for number, line in filled_lines(file, content):
        place = f"{file}, line {number}"
        advice = f"every line must hold one {content}, as an object"
        record = parse_json(line, file, number, advice)
        if not isinstance(record, dict):
            raise UserError(f"{place}: found {line.strip():.40} where an object is wanted; {advice}")
        if "\\u" in line:  # the only way in: the file itself is UTF-8
            _require_text(record, place)
        yield place, record


def parse_json(text: str, file: Path, line: int, advice: str) -> Any:
    """The value of a JSON text.

    Args:
        text: of the file, from the beginning of a line.
        file, line: where that is, for messages.
        advice: what to do where it is no JSON.

    Raises:
        UserError: it is no JSON, or is nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{file}, line {line - 1 + error.lineno}, column {error.colno}"
        raise UserError(f"{place}: not JSON: {error.msg}; {advice}") from error
    except (RecursionError, ValueError) as error:  # lists in lists in lists, or a number of thousands of digits
        raise UserError(f"{file}, line {line}: cannot be read as JSON: {one_line(error)}; {advice}") from error


def _require_text(record: dict[str, Any], place: str) -> None:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: half of a surrogate pair ({error.object[error.start]!a}), which is no text; "
            "write the file again from its source"
        ) from error
