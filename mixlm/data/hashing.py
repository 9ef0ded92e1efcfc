"""What a store was made from, as hashes."""

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from ..errors import UserError, file_error
from ..files import json_text, write_whole
from ..progress import progress_bar

# A file that was written a moment ago can be written again without a change of its time: its hash is not remembered.
SETTLED_AFTER_NS = 2_000_000_000

Stamps = dict[str, tuple[int, int]]  # of each file, in the order of reading: size, time of change in nanoseconds


def hash_json(value: object) -> str:
    """Hash of anything JSON can hold, the same in every process."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def file_stamps(files: Iterable[Path]) -> Stamps:
    """Size and time of change of each file; of a link those of its file, which can be there by another name too."""
    statuses = {str(file.absolute()): file.stat() for file in files}
    return {file: (status.st_size, status.st_mtime_ns) for file, status in statuses.items()}


def content_hashes(stamps: Stamps, cache_dir: Path) -> list[str]:
    """Hash of the content of each file.

    Args:
        stamps: the files.
        cache_dir: where the hashes are remembered. A file of the same size and time of change is not read again.

    Raises:
        UserError: a file cannot be read.
        OSError: the hashes cannot be remembered.
    """
    memory = cache_dir / "file_hashes.json"
    known = _remembered(memory, stamps)
    if len(known) < len(stamps):
        with FileLock(memory.with_suffix(".lock")):  # processes that start together read the files once
            known = _remembered(memory, stamps)
            unknown = [file for file in stamps if file not in known]
            size = sum(stamps[file][0] for file in unknown)
            with progress_bar(desc="hashing the corpus", total=size, unit="B", unit_scale=True) as progress:
                known.update((file, _hash_of_corpus_file(file, progress)) for file in unknown)
            _remember(memory, stamps, known)
    return [known[file] for file in stamps]


def hash_file(file: str | Path, progress: tqdm | None = None) -> str:
    """Hash of the content of a file; `progress` moves on by its bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
            if progress is not None:
                progress.update(len(piece))
    return digest.hexdigest()


def _hash_of_corpus_file(file: str, progress: tqdm) -> str:
    try:
        return hash_file(file, progress)
    except OSError as error:  # not one of the cache, which others are
        raise UserError(f"{file_error(error)}: the corpus file cannot be read") from error


def _read_memory(memory: Path) -> dict[str, dict]:
    try:
        entries = json.loads(memory.read_text(encoding="utf-8"))
        return {file: entry for file, entry in entries.items() if entry.keys() == {"size", "mtime_ns", "blake2b"}}
    except (OSError, ValueError, RecursionError, AttributeError):
        return {}


def _remembered(memory: Path, stamps: Stamps) -> dict[str, str]:
    """The hashes that are still good."""
    entries = _read_memory(memory)
    return {
        file: entries[file]["blake2b"]
        for file, (size, mtime_ns) in stamps.items()
        if file in entries and (entries[file]["size"], entries[file]["mtime_ns"]) == (size, mtime_ns)
    }


def _remember(memory: Path, stamps: Stamps, hashes: dict[str, str]) -> None:
    entries = _read_memory(memory)
    now = time.time_ns()
    for file, (size, mtime_ns) in stamps.items():
        if now - mtime_ns > SETTLED_AFTER_NS:
            entries[file] = {"size": size, "mtime_ns": mtime_ns, "blake2b": hashes[file]}
    write_whole(memory, json_text(entries))
