"""Vectors of passages on the disk, in shards that are whole or absent.

    vectors.json           of which encoder they are and, once all are there, which shards they are in, in order
    shard-HASH/            named by its passages
        vectors.npy        [passages, dimension]
        passages.arrow     the passages themselves
        hashes.npy         of the content of each
        shard.json         how many they are, and the hash of each file

A shard never changes. A run that was killed goes on at the first shard that is missing. A run over other passages
encodes those that are new or changed, and until it ends the folder has what it had before: for that time it may take
twice its place.
"""

import hashlib
import json
import multiprocessing
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from ..data.hashing import hash_file, hash_json
from ..data.passages import Passage
from ..encoder import MixLMEncoder
from ..errors import UserError, file_error
from ..files import whole_folder, write_whole
from .passages import StoredPassages, write_passages

FORMAT = 1
PASSAGES_PER_SHARD = 10_000

_MANIFEST, _SHARD = "vectors.json", "shard.json"
_VECTORS, _PASSAGES, _HASHES = "vectors.npy", "passages.arrow", "hashes.npy"
_HASH_BYTES = 16


class StoredVectors:
    """Vectors with their passages, mapped into memory.

    Attributes:
        encoder: what `MixLMEncoder.fingerprint` says of the encoder that made them.
        dimension: of a vector.
        dtype: "float32" or "float16".

    Raises:
        UserError: the folder has no vectors, not all of them yet, or is damaged.
    """

    def __init__(self, folder: Path):
        manifest = _read_manifest(folder)
        if not manifest["shards"]:
            raise UserError(f"{folder}: not all passages are encoded yet; run mixlm encode again, and it goes on")
        self.encoder, self.dimension, self.dtype = (manifest[name] for name in ("encoder", "dimension", "dtype"))
        self._length, self._folders = manifest["passages"], [folder / name for name in manifest["shards"]]
        for shard in self._folders:
            if (wrong := _what_is_wrong(shard)) is not None:
                raise UserError(f"{shard}: {wrong}; run mixlm encode again, and it mends the folder")

    def __len__(self) -> int:
        return self._length

    def passages(self) -> Iterator[Passage]:
        """The passages, in order."""
        for shard in self._folders:
            yield from StoredPassages(shard / _PASSAGES)

    def shards(self) -> Iterator[np.ndarray]:
        """The vectors [passages, dimension] of each shard, in order."""
        for shard in self._folders:
            yield np.load(shard / _VECTORS, mmap_mode="r")


def encode_passages(
    passages: Iterable[Passage],
    model: str,
    out: Path,
    *,
    dtype: str = "float32",
    batch_size: int = 64,
    processes: int = 1,
    passages_per_shard: int = PASSAGES_PER_SHARD,
) -> int:
    """Write the vectors of passages; what is there already is kept.

    Args:
        passages: read in a stream; no more than some shards of them are in memory, and 24 bytes of each that is known.
        model: the encoder's folder or Hub name.
        out: the folder.
        dtype: "float32" or "float16".
        batch_size: texts that are encoded at once.
        processes: that encode, each a shard at a time and, where there are GPUs, each on its own.
        passages_per_shard: how many of them are lost when a run is killed.

    Returns:
        How many passages there are.

    Raises:
        UserError: the model cannot be loaded; `out` has vectors of another encoder or another type, or cannot be
            written; there are no passages; a vector has what is no number, or too great for its type.
    """
    encoder = MixLMEncoder.from_pretrained(model, "cpu")
    description = {
        "format": FORMAT,
        "encoder": encoder.fingerprint(),
        "dimension": encoder.model.config.hidden_size,
        "dtype": dtype,
    }
    del encoder  # each process has its own
    try:
        _require_same(out, description)
        known = _KnownVectors(out, description["dimension"])
        names, count = [], 0
        with (
            _encoding_processes(processes, model, batch_size) as pool,
            tqdm(desc="encoding passages", unit=" passages", unit_scale=True, delay=2) as progress,
        ):
            due: deque[_DueShard] = deque()
            for of_shard in _cut(passages, passages_per_shard):
                folder = out / _shard_name(of_shard)
                names.append(folder.name)
                count += len(of_shard)
                if folder in known.shards:
                    progress.update(len(of_shard))
                    continue
                if not (out / _MANIFEST).exists():  # not before: a file that cannot be read leaves nothing behind
                    out.mkdir(parents=True, exist_ok=True)
                    _write_manifest(out, {**description, "passages": 0, "shards": []})
                due.append(_DueShard.of(folder, of_shard, known, pool))
                while len(due) > processes:  # so many are being encoded
                    due.popleft().write(dtype, progress)
            while due:
                due.popleft().write(dtype, progress)
        if not count:
            raise UserError("there is no passage; give at least one")
        _write_manifest(out, {**description, "passages": count, "shards": names})
        for folder in [*out.glob("shard-*"), *out.glob(".shard-*.partial")]:  # of passages that are no longer there
            if folder.name not in names:
                shutil.rmtree(folder)
    except BrokenExecutor as error:
        raise UserError(
            "an encoding process has ended, as it does without enough memory; use fewer --processes or a smaller "
            "--batch_size; run again, and it goes on"
        ) from error
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({file_error(error)})") from error
    return count


def difference(there: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first entry of `now`, in its order, that is another one in `there`, with both values; or None."""
    for name, value in now.items():
        if there.get(name) != value:
            return f"{name} is {there.get(name)} there and {value} now"
    return None


class _KnownVectors:
    """The vectors that are there when a run begins, by the content of their passages.

    Attributes:
        shards: the whole ones.
    """

    def __init__(self, folder: Path, dimension: int):
        self.shards = [shard for shard in sorted(folder.glob("shard-*")) if _what_is_wrong(shard) is None]
        self._dimension = dimension
        hashes = [np.load(shard / _HASHES) for shard in self.shards]
        self._hashes = np.concatenate(hashes) if hashes else np.empty(0, f"V{_HASH_BYTES}")
        self._starts = np.cumsum([0, *map(len, hashes)])
        self._order = np.argsort(self._hashes)

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The vectors [passages, dimension], float32, of passages with these hashes, and which of them are missing."""
        vectors, is_missing = np.zeros((len(hashes), self._dimension), np.float32), np.ones(len(hashes), bool)
        if not len(self._hashes):
            return vectors, is_missing
        places = np.searchsorted(self._hashes, hashes, sorter=self._order).clip(max=len(self._hashes) - 1)
        rows = self._order[places]
        is_missing = self._hashes[rows] != hashes
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(shards[~is_missing]):
            inside = np.flatnonzero((shards == number) & ~is_missing)
            stored = np.load(self.shards[number] / _VECTORS, mmap_mode="r")
            vectors[inside] = stored[rows[inside] - self._starts[number]]
        return vectors, is_missing


@dataclass
class _DueShard:
    """A shard whose missing vectors are being encoded."""

    folder: Path
    passages: list[Passage]
    hashes: np.ndarray
    vectors: np.ndarray
    is_missing: np.ndarray
    encoded: Future | None

    @classmethod
    def of(cls, folder: Path, passages: list[Passage], known: _KnownVectors, pool: Executor) -> "_DueShard":
        hashes = _content_hashes(passages)
        vectors, is_missing = known.find(hashes)
        missing = [passage for passage, lacks in zip(passages, is_missing, strict=True) if lacks]
        encoded = pool.submit(_encode, missing) if missing else None
        return cls(folder, passages, hashes, vectors, is_missing, encoded)

    def write(self, dtype: str, progress: tqdm) -> None:
        """Wait for the vectors, and write them all."""
        if self.encoded is not None:
            self.vectors[self.is_missing] = self.encoded.result()
        with np.errstate(over="ignore"):  # it becomes infinite
            vectors = self.vectors.astype(dtype)
        bad = ~np.isfinite(vectors).all(axis=1)
        if bad.any():
            raise UserError(
                f"passage '{self.passages[bad.argmax()].id}': its vector has what is no number in {dtype}; use "
                "--dtype float32, or a model that is trained"
            )
        with whole_folder(self.folder) as partial:
            np.save(partial / _VECTORS, vectors)
            np.save(partial / _HASHES, self.hashes)
            write_passages(partial / _PASSAGES, self.passages)
            record = {"passages": len(self.passages), "files": _file_hashes(partial)}
            (partial / _SHARD).write_text(json.dumps(record, indent=2), "utf-8")
        progress.update(len(self.passages))


_encoder: MixLMEncoder | None = None  # of this process


def _encoding_processes(processes: int, model: str, batch_size: int) -> Executor:
    """What `_encode` is given to. A single one is this process itself."""
    context = multiprocessing.get_context("spawn")  # a forked process could not use a GPU
    numbers = context.Queue()
    for number in range(processes):
        numbers.put(number)
    beginning = {"initializer": _load_encoder, "initargs": (model, batch_size, numbers)}
    if processes == 1:
        return ThreadPoolExecutor(1, **beginning)
    return ProcessPoolExecutor(processes, context, **beginning)


def _load_encoder(model: str, batch_size: int, numbers: "multiprocessing.Queue[int]") -> None:
    """What a process begins with."""
    global _encoder
    disable_progress_bar()  # of loading weights
    gpus = torch.cuda.device_count()
    device = f"cuda:{numbers.get() % gpus}" if gpus else "cpu"
    _encoder = MixLMEncoder.from_pretrained(model, device, batch_size)


def _encode(passages: list[Passage]) -> np.ndarray:
    return _encoder.encode_passages(passages)


def _require_same(out: Path, description: dict[str, Any]) -> None:
    """Raise UserError unless `out` has vectors like these, is empty or is not there."""
    if (out / _MANIFEST).is_file():
        there, now = ({**each["encoder"], **each} for each in (_read_manifest(out), description))
        if (other := difference(there, now)) is not None:
            raise UserError(f"{out}: has other vectors: {other}; use another folder, or delete it")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and has no vectors; use another name or delete it")


def _cut(passages: Iterable[Passage], size: int) -> Iterator[list[Passage]]:
    remaining = iter(passages)
    while batch := list(islice(remaining, size)):
        yield batch


def _shard_name(passages: list[Passage]) -> str:
    return f"shard-{hash_json(passages)}"


def _content_hashes(passages: Sequence[Passage]) -> np.ndarray:
    """Of what is encoded, titles and texts, [passages]; the ids do not count."""
    digests = [
        hashlib.blake2b(json.dumps([title, text]).encode(), digest_size=_HASH_BYTES).digest()
        for _, title, text in passages
    ]
    return np.frombuffer(b"".join(digests), f"V{_HASH_BYTES}")


def _what_is_wrong(shard: Path) -> str | None:
    """In what a shard is not as it was written, if in anything."""
    try:
        files = json.loads((shard / _SHARD).read_text("utf-8"))["files"]
        found = _file_hashes(shard)
        changed = [name for name, hash_then in files.items() if found.get(name) != hash_then]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "is missing or damaged"
    return f"{', '.join(changed)} changed since it was written" if changed else None


def _file_hashes(shard: Path) -> dict[str, str]:
    with tqdm(disable=True) as progress:
        return {name: hash_file(shard / name, progress) for name in (_VECTORS, _PASSAGES, _HASHES)}


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / _MANIFEST
    again = "use another folder, or delete it, and encode again"
    try:
        manifest = json.loads(file.read_text("utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(f"{file}: is of format {manifest['format']}, this version has {FORMAT}; {again}")
        simple = {name: manifest[name] for name in ("format", "dimension", "dtype", "passages")}
        return {**simple, "encoder": dict(manifest["encoder"]), "shards": list(manifest["shards"])}
    except OSError as error:
        raise UserError(f"{folder}: has no vectors ({file_error(error)}); make them with mixlm encode") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is damaged; {again}") from error


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_whole(folder / _MANIFEST, json.dumps(manifest, indent=2) + "\n")
