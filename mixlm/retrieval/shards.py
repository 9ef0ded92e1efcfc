"""Several indexes that are searched as one: each has some of the passages, and all have vectors of the same encoder.

So a collection can be larger than what one process, one disk or one evening makes an index of. What is found by
vectors is what one exact index of all passages would find, also where scores are equal. Terms are left out: what one
is worth in BM25 depends on all passages.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import numpy as np

from ..data.passages import Passage
from ..errors import UserError
from .hits import PassageHit, best_hits
from .index import Index, open_index
from .vectors import difference


class _Rows:
    """Which shard a row is of, where the shards' rows are counted one after the other."""

    def __init__(self, lengths: Sequence[int]):
        self.firsts = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def place(self, row: int) -> tuple[int, int]:
        """The shard, and the row in it."""
        shard = int(np.searchsorted(self.firsts, row, side="right")) - 1
        return shard, int(row - self.firsts[shard])


class ShardedPassages:
    """The passages of all shards, as `StoredPassages` has those of one."""

    def __init__(self, shards: Sequence[Index]):
        self._shards, self._rows = shards, _Rows([len(shard.passages) for shard in shards])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Passage:
        shard, own_row = self._rows.place(row)
        return self._shards[shard].passages[own_row]

    def id_of_row(self, row: int) -> str:
        """The id of a passage."""
        shard, own_row = self._rows.place(row)
        return self._shards[shard].passages.id_of_row(own_row)


class ShardedDense:
    """Finds passages of all shards by their vectors, as `DenseIndex` does in one."""

    def __init__(self, shards: Sequence[Index]):
        self._parts, self._rows = [shard.dense for shard in shards], _Rows([len(shard.dense) for shard in shards])
        self._precedence = ShardedPassages(shards).id_of_row

    def __len__(self) -> int:
        return len(self._rows)

    def search(self, questions: np.ndarray, top_k: int) -> Iterator[list[PassageHit]]:
        """The best passages for each question, the best first; the shards are searched at the same time.

        Args:
            questions: vectors, float32 [questions, dimension].
            top_k: the most hits of a question.
        """
        with ThreadPoolExecutor(len(self._parts)) as threads:
            found = list(threads.map(lambda part: list(part.search(questions, top_k)), self._parts))
        for of_question in zip(*found, strict=True):
            rows = [
                hit.row + first for hits, first in zip(of_question, self._rows.firsts, strict=False) for hit in hits
            ]
            scores = [hit.score for hits in of_question for hit in hits]
            yield best_hits(
                np.array(rows, dtype=np.int64), np.array(scores, dtype=np.float32), top_k, self._precedence
            )

    def vectors_of(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of passages, [rows, dimension]."""
        places = map(self._rows.place, rows.tolist())
        return np.stack([self._parts[shard].vectors_of(np.array([row]))[0] for shard, row in places])


class ShardedIndex:
    """Several indexes, to be searched by `mixlm.retrieval.search.Search`.

    Args:
        shards: at least one; in which order does not matter.

    Raises:
        UserError: one has no vectors, or vectors of another encoder; a passage is in two of them.
    """

    def __init__(self, shards: Sequence[Index]):
        first = shards[0]
        for shard in shards:
            if shard.dense is None:
                raise UserError(f"{shard.folder}: has no vectors; several indexes are searched by vectors alone")
            if (
                other := difference(first.manifest["dense"]["encoder"], shard.manifest["dense"]["encoder"])
            ) is not None:
                raise UserError(
                    f"{shard.folder}: has vectors of another encoder than {first.folder}: {other}; encode both by one"
                )
        for one, other in combinations(shards, 2):
            if (common := one.passages.first_common_id(other.passages)) is not None:
                raise UserError(f"passage '{common}' is in {one.folder} and in {other.folder}; index it once")
        self.folder, self.manifest, self.model = first.folder, first.manifest, first.model
        self.passages, self.dense = ShardedPassages(shards), ShardedDense(shards)


def open_shards(folders: Sequence[Path]) -> ShardedIndex:
    """Open several indexes as one; errors are those of `open_index` and `ShardedIndex`."""
    return ShardedIndex([open_index(folder) for folder in folders])
