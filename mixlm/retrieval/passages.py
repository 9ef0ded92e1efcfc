"""Passages in an Arrow file: written in a stream, mapped into memory to be shown. Rows are counted from 0."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ..data.chunks import in_chunks
from ..data.passages import Passage

_ROWS_PER_BATCH = 1024  # of the file; what is held in memory while it is written
_SCHEMA = pa.schema([(field, pa.large_string()) for field in Passage._fields])


class StoredPassages:
    """The passages of an Arrow file by their row."""

    def __init__(self, path: Path):
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        # Of each batch its columns, which are views into the file.
        self._batches = [reader.get_batch(number).columns for number in range(reader.num_record_batches)]
        self._length = sum(len(columns[0]) for columns in self._batches)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> Passage:
        batch, offset = divmod(row, _ROWS_PER_BATCH)
        return Passage(*(column[offset].as_py() for column in self._batches[batch]))

    def __iter__(self) -> Iterator[Passage]:
        for columns in self._batches:
            yield from map(Passage, *(column.to_pylist() for column in columns))

    def id_of_row(self, row: int) -> str:
        """The id of a passage; faster than all of it."""
        batch, offset = divmod(row, _ROWS_PER_BATCH)
        return self._batches[batch][0][offset].as_py()

    def first_common_id(self, others: "StoredPassages") -> str | None:
        """The id of the first passage here that is also one of `others`, if there is one."""
        theirs = pa.chunked_array([columns[0] for columns in others._batches], pa.large_string())
        for columns in self._batches:
            is_common = pc.is_in(columns[0], value_set=theirs)
            if (place := pc.index(is_common, True).as_py()) >= 0:
                return columns[0][place].as_py()
        return None

    def has_any(self, ids: Iterable[str]) -> bool:
        """Whether one of these is the id of a passage."""
        wanted = pa.array(list(ids), pa.large_string())
        return any(pc.any(pc.is_in(columns[0], value_set=wanted)).as_py() for columns in self._batches)


def write_passages(path: Path, passages: Iterable[Passage]) -> tuple[int, str]:
    """Write the file of `StoredPassages`.

    Returns:
        How many passages there were, and a hash of them that depends on nothing but their content and order.
    """
    count, digest = 0, hashlib.blake2b(digest_size=16)
    with pa.ipc.new_file(str(path), _SCHEMA) as writer:
        for batch in in_chunks(passages, _ROWS_PER_BATCH):
            count += len(batch)
            for passage in batch:
                digest.update(json.dumps(passage, ensure_ascii=False).encode())
            columns = [pa.array(column, pa.large_string()) for column in zip(*batch, strict=True)]
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
    return count, digest.hexdigest()
