"""Text files, also compressed: what their names say, their lines, and how they are written."""

import gzip
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import UserError
from ..files import flush, partial_name

COMPRESSED = {".gz": gzip.open, ".xz": lzma.open}


def plain_suffix(file: Path) -> str:
    """The last suffix of a name, or the one before it where the last is one of `COMPRESSED`."""
    return Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix


def numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Stream the lines of a UTF-8 file, decompressed where its name ends in .xz or .gz, with their numbers from 1.

    A line keeps its end; a byte order mark is left out. Each is decoded by itself so that an error can name its byte.

    Raises:
        UserError: the file cannot be read, is damaged or is not UTF-8.
    """
    number = offset = 0
    text = "decompressed text" if file.suffix in COMPRESSED else "text"
    try:
        with COMPRESSED.get(file.suffix, open)(file, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                decoded = line.decode("utf-8")
                yield number, decoded.removeprefix("\ufeff") if number == 1 else decoded
                offset += len(line)
    except UnicodeDecodeError as error:
        position = offset + error.start
        raise UserError(
            f"{file}, line {number}: byte 0x{error.object[error.start]:02x} at offset {position} of the {text} is not "
            "UTF-8; convert the file, for example with iconv -f cp949 -t utf-8"
        ) from error
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{file}, after line {number} (byte {offset} of the {text}): the compressed data is truncated or damaged "
            f"({error}); copy or compress the file again"
        ) from error
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file; check its name") from error
    except IsADirectoryError as error:
        raise UserError(f"{file}: cannot be read: it is a folder; give a file") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}); check its permissions") from error


def filled_lines(file: Path, content: str) -> Iterator[tuple[int, str]]:
    """The `numbered_lines` that are not blank, at least one; `content` is what they hold, for messages.

    Raises:
        UserError: as `numbered_lines`, or all are blank.
    """
    is_empty = True
    for number, line in numbered_lines(file):
        if line.strip():
            is_empty = False
            yield number, line
    if is_empty:
        raise UserError(f"{file}: the file has no {content}; is it whole?")


def write_text(file: Path, pieces: Iterable[str]) -> None:
    """Write a UTF-8 file, so that whatever happens it has its old or its whole new content.

    Args:
        file: compressed where its name ends in .gz or .xz.
        pieces: of the text; they are written as they come.

    Raises:
        UserError: it cannot be written, or is something else than a file.
    """
    if file.exists() and not file.is_file():
        raise UserError(f"{file}: cannot be written: it is no file; use another name")
    partial = partial_name(file)
    try:
        with COMPRESSED.get(file.suffix, open)(partial, "wt", encoding="utf-8", newline="\n") as stream:
            stream.writelines(pieces)
        flush(partial)
        os.replace(partial, file)
        flush(file.parent)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
