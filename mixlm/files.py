"""Folders and files that are either whole or absent, whatever happens while they are written; and JSON files."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError

from .errors import UserError, one_line

# Python has half of a surrogate pair for a byte of a name that is not UTF-8; this writes it as JSON's \udcc7.
_NAMES_ESCAPED = "backslashreplace"


def cache_folder(asked: str | Path | None = None) -> Path:
    """Where tokenized corpora and the like are kept: `asked`, or MIXLM_CACHE, or ~/.cache/mixlm."""
    return Path(asked or os.environ.get("MIXLM_CACHE") or "~/.cache/mixlm").expanduser()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to be filled. When all went well it takes the place of `folder`, and else it is removed.

    It lies beside `folder` as `.NAME.partial`, and is flushed to the disk before it is renamed, so that a power cut
    leaves no folder with empty files either. What it replaces lies aside as `.NAME.earlier` for that moment. What an
    interrupted process has left is put back or removed by the next one that writes it. A link stays: what it leads to
    is replaced.

    Raises:
        UserError: another process is writing it, or a disk is mounted at `folder`, so that nothing can take its place.
        OSError: it cannot be written; also where safetensors reports that in a way of its own.
    """
    _require_no_mount(folder)
    folder = Path(os.path.realpath(folder))
    partial = partial_name(folder)
    with _for_this_process(partial, folder):
        _settle(folder)
    partial.mkdir(parents=True)
    with _for_this_process(partial, folder):
        try:
            yield partial
            for path in [*partial.rglob("*"), partial]:
                flush(path)
            if folder.is_dir():
                os.replace(folder, earlier_name(folder))
            os.replace(partial, folder)
            flush(folder.parent)
        except SafetensorError as error:
            raise OSError(one_line(error)) from error
        finally:
            _settle(folder)


@contextmanager
def _for_this_process(partial: Path, folder: Path) -> Iterator[None]:
    """Hold a lock of `partial`, if it is there: without one it is what an interrupted process has left.

    Raises:
        UserError: another process holds it.
    """
    if not partial.is_dir():
        yield
        return
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process is writing it; wait for it, or use another name") from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def _settle(folder: Path) -> None:
    """Remove what `whole_folder` has beside a folder; what was to be replaced and was not is put back."""
    partial, earlier = partial_name(folder), earlier_name(folder)
    shutil.rmtree(partial, ignore_errors=True)
    if earlier.is_dir():
        # Renamed before it is removed: what is put back after a kill is never half of what it was.
        os.replace(earlier, partial if folder.exists() else folder)
        shutil.rmtree(partial, ignore_errors=True)


def write_whole(file: Path, text: str) -> None:
    """Write a file, so that whatever happens it has its old or its new content.

    Args:
        file: what is written or replaced.
        text: its content. Names of files that are not UTF-8 are escaped in it, as JSON does.

    Raises:
        OSError: it cannot be written.
    """
    partial = partial_name(file)
    partial.write_text(text, "utf-8", _NAMES_ESCAPED)
    flush(partial)
    os.replace(partial, file)
    flush(file.parent)


def json_text(value: Any) -> str:
    """As all JSON files here are written: indented, letters as they are, with a line's end."""
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file where half of one does no harm, as in a folder that becomes whole later.

    Args:
        file: what is written or replaced.
        value: its content. Names of files that are not UTF-8 are escaped in it.

    Raises:
        OSError: it cannot be written.
    """
    file.write_text(json_text(value), "utf-8", _NAMES_ESCAPED)


def partial_name(folder: Path) -> Path:
    """Where a folder or file lies while it is being written."""
    return folder.with_name(f".{folder.name}.partial")


def earlier_name(folder: Path) -> Path:
    """Where a folder lies, for a moment, while another one takes its place."""
    return folder.with_name(f".{folder.name}.earlier")


def names_of_remnants(name: str) -> list[str]:
    """What a killed `whole_folder` may leave beside a folder of that name, which can be a pattern."""
    return [name_of(Path(name)).name for name_of in (partial_name, earlier_name)]


def require_inside(names: Iterable[str], of: Path) -> None:
    """Raise UserError where a file of a folder, by a name that is read from `of` in it, would lie outside of it."""
    for name in names:
        path = PurePath(name)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{of}: names {one_line(name):.80}, outside of its folder; do not trust that folder")


def flush(path: Path) -> None:
    """Make the content of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """As `whole_folder`, for a folder that a user has named: nothing that lies there is replaced.

    Raises:
        UserError: `out` is a file or holds something, or it cannot be written.
    """
    require_free(out)
    try:
        with whole_folder(out) as partial:
            yield partial
            require_free(out)  # nothing may have come there in the meantime
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error


def require_free(out: Path) -> None:
    """Raise UserError where `out` is a file, a folder that holds something, or the place where a disk is mounted."""
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: exists and is not empty; use another name or delete it")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; use another name")
    _require_no_mount(out)


def _require_no_mount(folder: Path) -> None:
    if os.path.ismount(os.path.realpath(folder)):
        raise UserError(f"{folder}: a disk is mounted there, and cannot be replaced; use the name of a folder in it")
