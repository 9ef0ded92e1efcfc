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
import logging
import multiprocessing
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from ..data.chunks import in_chunks
from ..data.hashing import hash_file, hash_json
from ..data.passages import Passage
from ..data.retrieval import RetrievalTokenizer
from ..encoder import Encoding, MixLMEncoder
from ..errors import UserError, file_error, is_out_of_memory, one_line
from ..files import names_of_remnants, require_inside, whole_folder, write_json
from ..progress import hide_progress_bars, progress_bar
from .manifest import read_manifest, write_manifest
from .passages import StoredPassages, write_passages

FORMAT = 2
PASSAGES_PER_SHARD = 10_000
PASSAGES_TO_MEASURE = 1_000

_MANIFEST, _SHARD = "vectors.json", "shard.json"
_VECTORS, _PASSAGES, _HASHES = "vectors.npy", "passages.arrow", "hashes.npy"
_HASH_BYTES = 16

logger = logging.getLogger(__name__)


class StoredVectors:
    """Vectors with their passages, mapped into memory.

    Attributes:
        encoder: what `MixLMEncoder.fingerprint` says of the encoder that made them.
        model: where that was: its folder, as an absolute path, or its Hub name.
        dimension: of a vector.
        dtype: "float32" or "float16".

    Raises:
        UserError: the folder has no vectors, not all of them yet, or is damaged.
    """

    def __init__(self, folder: Path):
        manifest = _read_manifest(folder)
        if not manifest["shards"]:
            raise UserError(f"{folder}: not all passages are encoded yet; run mixlm encode again, and it goes on")
        require_inside(manifest["shards"], folder / _MANIFEST)
        self.encoder, self.model = manifest["encoder"], manifest["model"]
        self.dimension, self.dtype = manifest["dimension"], manifest["dtype"]
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

    A model that `run_ict.py` has not written, such as a reader, has vectors too: that they may find little is logged,
    and so is how much of the passages is too long to be in a vector.

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
        UserError: the model cannot be loaded, or memory is too small for it; `out` has vectors of another encoder or
            another type, or cannot be written; there are no passages; a vector has what is no number, or too great for
            its type.
    """
    encoder = MixLMEncoder.from_pretrained(model, "cpu")
    if Encoding.load(model) is None:
        logger.warning(
            "%s: is not what run_ict.py writes (it has no %s); its vectors may find little", model, Encoding.file_name
        )
    description = {
        "format": FORMAT,
        "encoder": encoder.fingerprint(),
        "dimension": encoder.model.config.hidden_size,
        "dtype": dtype,
    }
    tokenizer = encoder.tokenizer
    del encoder  # each process has its own
    # Not in the description: a model that was moved makes the same vectors.
    model = str(Path(model).resolve()) if Path(model).is_dir() else model
    try:
        _require_same(out, description)
        known = _KnownVectors(out, description["dimension"])
        names, count = [], 0
        with (
            _encoding_processes(processes, model, batch_size) as pool,
            progress_bar(desc="encoding passages", unit=" passages", unit_scale=True) as progress,
        ):
            due: deque[_DueShard] = deque()
            for of_shard in in_chunks(passages, passages_per_shard):
                if not names:
                    _log_cut_passages(tokenizer, of_shard[:PASSAGES_TO_MEASURE])
                folder = out / _shard_name(of_shard)
                names.append(folder.name)
                count += len(of_shard)
                if folder in known.shards:
                    progress.update(len(of_shard))
                    continue
                if not (out / _MANIFEST).exists():  # not before: a file that cannot be read leaves nothing behind
                    out.mkdir(parents=True, exist_ok=True)
                    empty = {**description, "model": model, "passages": 0, "shards": []}
                    write_manifest(out / _MANIFEST, empty)
                due.append(_DueShard.of(folder, of_shard, known, pool))
                while due and (due[0].is_encoded or len(due) > processes):  # so many are being encoded
                    due.popleft().write(dtype, progress)
            while due:
                due.popleft().write(dtype, progress)
        if not count:
            raise UserError("there is no passage; give at least one")
        whole = {**description, "model": model, "passages": count, "shards": names}
        write_manifest(out / _MANIFEST, whole)
        for pattern in ("shard-*", *names_of_remnants("shard-*")):  # of passages that are no longer there
            for folder in out.glob(pattern):
                if folder.name not in names:
                    shutil.rmtree(folder)
    except (RuntimeError, MemoryError) as error:
        advice = "use a smaller --batch_size or fewer --processes; run again, and it goes on"
        if isinstance(error, BrokenExecutor):
            raise UserError(f"an encoding process has ended, as it does without enough memory; {advice}") from error
        if is_out_of_memory(error):
            raise UserError(f"out of memory; {advice} ({one_line(error)[:200]})") from error
        raise
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({file_error(error)})") from error
    return count


def _log_cut_passages(tokenizer: RetrievalTokenizer, passages: Sequence[Passage]) -> None:
    lengths = tokenizer.passage_lengths(passages)
    cut_off = (lengths - tokenizer.max_passage_length).clip(min=0)
    if cut_off.any():
        logger.warning(
            "%s of the first %s passages are longer than the %s tokens that the encoder takes: of all tokens %.1f%% "
            "are in no vector; train with a longer --max_passage_length, or give shorter passages",
            f"{np.count_nonzero(cut_off):,}", f"{len(lengths):,}", tokenizer.max_passage_length,
            100 * cut_off.sum() / lengths.sum(),
        )  # fmt: skip


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

    @property
    def is_encoded(self) -> bool:
        return self.encoded is None or self.encoded.done()

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
            write_json(partial / _SHARD, record)
        progress.update(len(self.passages))


class _ThisProcess(Executor):
    """Does at once what it is given: Ctrl-C has no thread to wait for."""

    def submit(self, function: Callable, /, *arguments: Any) -> Future:
        future = Future()
        future.set_result(function(*arguments))
        return future


class _OtherProcesses(ProcessPoolExecutor):
    """Processes that Ctrl-C does not reach, from their first moment on: it is for this one, which will end them."""

    def submit(self, function: Callable, /, *arguments: Any) -> Future:
        # Here they are started, and they begin with the signals blocked that are blocked here.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            return super().submit(function, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextmanager
def _encoding_processes(processes: int, model: str, batch_size: int) -> Iterator[Executor]:
    """What `_encode` is given to. A single one is this process itself. After an error nobody waits for the others."""
    context = multiprocessing.get_context("spawn")  # a forked process could not use a GPU
    if processes == 1:
        _begin(model, batch_size, 0)
        yield _ThisProcess()
        return
    numbers = context.Queue()
    for number in range(processes):
        numbers.put(number)
    threads = max(1, torch.get_num_threads() // processes)
    others = multiprocessing.active_children()
    pool = _OtherProcesses(processes, context, _begin_worker, (model, batch_size, numbers, threads))
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Callable[[], MixLMEncoder]  # of this process, loaded when it is called first


def _begin(model: str, batch_size: int, number: int) -> None:
    global _encoder
    gpus = torch.cuda.device_count()
    device = f"cuda:{number % gpus}" if gpus else "cpu"
    if gpus:
        torch.cuda.set_device(device)  # what is not told the device, as pinned memory, would be of the first one
    # Not loaded here: of what fails here, the process that waits for the vectors would not hear.
    _encoder = cache(partial(MixLMEncoder.from_pretrained, model, device, batch_size))


def _begin_worker(model: str, batch_size: int, numbers: "multiprocessing.Queue[int]", threads: int) -> None:
    """What a process of several begins with."""
    Thread(target=_end_with_parent, daemon=True).start()
    hide_progress_bars()
    disable_progress_bar()  # of loading weights
    torch.set_num_threads(threads)
    _begin(model, batch_size, numbers.get())


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for work forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode(passages: list[Passage]) -> np.ndarray:
    return _encoder().encode_passages(passages)


def _require_same(out: Path, description: dict[str, Any]) -> None:
    """Raise UserError unless `out` has vectors like these, is empty or is not there."""
    if (out / _MANIFEST).is_file():
        there, now = ({**each["encoder"], **each} for each in (_read_manifest(out), description))
        if (other := difference(there, now)) is not None:
            raise UserError(f"{out}: has other vectors: {other}; use another folder, or delete it")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and has no vectors; use another name or delete it")


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
        changed = [name for name, hash_now in _file_hashes(shard).items() if files.get(name) != hash_now]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return "is missing or damaged"
    return f"{', '.join(changed)} changed since it was written" if changed else None


def _file_hashes(shard: Path) -> dict[str, str]:
    return {name: hash_file(shard / name) for name in (_VECTORS, _PASSAGES, _HASHES)}


def _read_manifest(folder: Path) -> dict[str, Any]:
    again = "use another folder, or delete it, and encode again"
    try:
        return read_manifest(folder / _MANIFEST, FORMAT, again)
    except OSError as error:
        raise UserError(f"{folder}: has no vectors ({file_error(error)}); make them with mixlm encode") from error
