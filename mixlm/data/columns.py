"""Columns of numbers in Arrow files: written in a stream, mapped into memory to be read."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa

ROWS_PER_BATCH = 1 << 17  # of a file; what is held in memory while one is written, for each column


class ArrowColumn:
    """The numbers of a one-column Arrow file, mapped into memory and read without a copy."""

    def __init__(self, path: Path):
        # Without threads: a data loader forks, and a pool of threads does not live through that.
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)), options=pa.ipc.IpcReadOptions(use_threads=False))
        self._batches: list[np.ndarray | None] = [None] * self._reader.num_record_batches
        self._rows_per_batch = len(self._batch(0))  # of all of them but the last
        self._length = self._rows_per_batch * (len(self._batches) - 1) + len(self._batch(len(self._batches) - 1))

    def __len__(self) -> int:
        return self._length

    def read(self, first: int, last: int) -> np.ndarray:
        """Rows `first` to `last`, exclusive: a read-only view, or a copy where they lie in several record batches."""
        batch, offset = divmod(first, self._rows_per_batch)
        if last <= (batch + 1) * self._rows_per_batch:
            return self._batch(batch)[offset : offset + last - first]
        pieces = [self._batch(batch)[offset:]]
        while (batch := batch + 1) * self._rows_per_batch < last:
            pieces.append(self._batch(batch)[: last - batch * self._rows_per_batch])
        return np.concatenate(pieces)

    def _batch(self, index: int) -> np.ndarray:
        values = self._batches[index]
        if values is None:
            values = self._reader.get_batch(index).column(0).to_numpy(zero_copy_only=True)
            self._batches[index] = values
        return values


class ArrowColumnWriter:
    """Writes the file of an `ArrowColumn` piece by piece; leaving its `with` block puts all of it on the disk."""

    def __init__(self, path: Path, dtype: np.dtype):
        self._buffer = np.empty(ROWS_PER_BATCH, dtype)
        self._filled = 0
        self._schema = pa.schema([("values", pa.from_numpy_dtype(dtype))])
        self._file = open(path, "wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)

    def __enter__(self) -> "ArrowColumnWriter":
        return self

    def __exit__(self, error_type: type | None, *_) -> None:
        with self._file:
            if error_type is None:
                self._flush()
                self._writer.close()
                self._file.flush()
                os.fsync(self._file.fileno())

    def append(self, values: np.ndarray) -> None:
        """Add values, [any number], at the end."""
        while len(values):
            taken = values[: ROWS_PER_BATCH - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            if self._filled == ROWS_PER_BATCH:
                self._flush()
            values = values[len(taken) :]

    def _flush(self) -> None:
        if self._filled:
            values = pa.array(self._buffer[: self._filled])
            self._writer.write_batch(pa.record_batch([values], schema=self._schema))
            self._filled = 0
