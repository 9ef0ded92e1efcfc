"""Search by inner products of vectors, kept by FAISS (https://github.com/facebookresearch/faiss).

    vectors.faiss          all vectors, float32
    finder.faiss           what finds candidates among them; an exact index has none
    rows.npy               the passage of each vector, where passages were added or have gone since it was built

All are mapped into memory. Whatever finds the candidates, their scores are inner products with the vectors
themselves, added up in float64: a question has the same hits and scores in any company, on any number of threads.

* exact: every vector is looked at.
* hnsw: a graph of neighbours (Malkov and Yashunin, 2016, arXiv:1603.09320). Each vector has M = 32 neighbours, chosen
  out of efConstruction = 200; a search keeps the best efSearch it has met: 64 for up to 100,000 passages, 128 for up
  to a million, 256 for more. A graph that several threads have built differs a little from build to build.
* ivfpq: lists of near vectors, of which a search reads some, and in them codes of dimension / 4 bytes instead of
  vectors (Jégou, Douze and Schmid, "Product Quantization for Nearest Neighbor Search", 2011). There are about
  4 * sqrt(passages) lists, and a sixteenth of them is read; four times the hits wanted are found by their codes. For
  10,000 passages or more: codes are learnt from them.

Where passages have gone, the finder still meets their vectors: it is asked for more candidates, by twice the ratio of
all vectors to those that are left, and theirs are dropped. Where a question then has too few, as one about what has
gone, every vector is looked at for it.
"""

import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from ..data.packages import required
from ..errors import UserError, one_line
from ..progress import progress_bar
from .hits import PassageHit, Precedence, best_hits, smaller_row

faiss = required("faiss")

KINDS = ("exact", "hnsw", "ivfpq")
FEWEST_FOR_IVFPQ = 10_000

_VECTORS, _FINDER, _ROWS = "vectors.faiss", "finder.faiss", "rows.npy"
_CODE_BITS = 8
_TRAINING_PER_LIST = (39, 64)  # vectors: fewer than 39 are too few for FAISS
_CODED_CANDIDATES = 4  # found by their codes, for each hit that is wanted
_MARGIN = 10  # candidates beyond those that are wanted, so that equal scores at the end seldom take another search
_ROUNDING = 1e-5  # of scores by FAISS, as a share of the best
_SCORES_AT_ONCE = 1 << 22  # bounds the memory of a search: candidates of all its questions, numbers of their vectors
_RECALL_DEPTH, _RECALL_SAMPLE = 10, 1000


class DenseIndex:
    """Passages by their vectors.

    Args:
        vectors: of all passages.
        finder: what finds candidates among them; `vectors` itself in an exact index.
        precedence: of equal scores.
        rows: of each vector the row of its passage, -1 where that is gone; None where both are in the same order.

    Attributes:
        parameters: the kind, and what FAISS was given.
    """

    def __init__(
        self,
        vectors: "faiss.IndexFlatIP",
        finder: "faiss.Index",
        precedence: Precedence = smaller_row,
        rows: np.ndarray | None = None,
    ):
        self._flat, self._finder, self._precedence, self._rows = vectors, finder, precedence, rows
        self._places = None  # by row, where its vector is
        if rows is not None:
            live = np.flatnonzero(rows >= 0)
            self._places = live[np.argsort(rows[live])]

    @classmethod
    def build(cls, shards: Iterable[np.ndarray], kind: str) -> "DenseIndex":
        """Index vectors; all of them are held in memory, as float32, until they are saved.

        Args:
            shards: vectors [passages, dimension], at least one, float32 or float16.
            kind: one of `KINDS`.

        Raises:
            UserError: they are too few for the kind.
        """
        index = None
        for shard in progress_bar(shards, desc="indexing vectors", unit=" shards"):
            if index is None:
                index = _new_hnsw(shard.shape[1]) if kind == "hnsw" else faiss.IndexFlatIP(shard.shape[1])
            index.add(np.ascontiguousarray(shard, dtype=np.float32))
        if kind == "hnsw":
            _set_effort(index)
            return cls(faiss.downcast_index(index.storage), index)
        return cls(index, _build_ivfpq(index) if kind == "ivfpq" else index)

    @classmethod
    def extend(cls, folder: Path, added: np.ndarray, rows: np.ndarray) -> "DenseIndex":
        """What `save` has written, with more vectors behind the others: its graph or its lists are not built again.

        Args:
            folder: of an index that is not exact.
            added: vectors [added, dimension], float32.
            rows: of each vector, those that are there and then the added, the row of its passage now; -1 for none.
        """
        vectors = faiss.read_index(str(folder / _VECTORS))
        finder = faiss.read_index(str(folder / _FINDER), faiss.IO_FLAG_SKIP_STORAGE)
        if isinstance(finder, faiss.IndexHNSW):
            finder.storage, finder.own_fields = vectors, False
            finder.add(added)  # to the storage, too
            _set_effort(finder)
        else:
            vectors.add(added)
            finder.add(added)
        return cls(vectors, finder, rows=rows)

    @classmethod
    def load(cls, folder: Path, precedence: Precedence = smaller_row) -> "DenseIndex":
        """What `save` has written, mapped into memory; `precedence` is of equal scores."""
        vectors = faiss.read_index(str(folder / _VECTORS), faiss.IO_FLAG_MMAP_IFC)
        if not (folder / _FINDER).is_file():
            return cls(vectors, vectors, precedence)
        rows = np.load(folder / _ROWS, mmap_mode="r") if (folder / _ROWS).is_file() else None
        finder = faiss.read_index(str(folder / _FINDER), faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_SKIP_STORAGE)
        if isinstance(finder, faiss.IndexHNSW):
            finder.storage, finder.own_fields = vectors, False
        return cls(vectors, finder, precedence, rows)

    def save(self, folder: Path) -> None:
        """Write it into a folder, which is made.

        Raises:
            OSError: it cannot be written.
        """
        folder.mkdir()
        try:
            faiss.write_index(self._flat, str(folder / _VECTORS))
            if not self._is_exact:
                faiss.write_index(self._finder, str(folder / _FINDER), faiss.IO_FLAG_SKIP_STORAGE)
            if self._rows is not None:
                np.save(folder / _ROWS, self._rows)
        except RuntimeError as error:  # what FAISS has for a full disk, too
            raise OSError(one_line(error)) from error

    def __len__(self) -> int:
        return self._flat.ntotal if self._places is None else len(self._places)

    @cached_property
    def vectors(self) -> np.ndarray:
        """All vectors, [vectors, dimension], also of passages that are gone; to be read only while the index lives."""
        count, dimension = self._flat.ntotal, self._flat.d
        return faiss.rev_swig_ptr(self._flat.get_xb(), count * dimension).reshape(count, dimension)

    def places_of(self, rows: np.ndarray) -> np.ndarray:
        """Where in `vectors` those of passages are, [rows]."""
        return rows if self._places is None else self._places[rows]

    def vectors_of(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of passages, [rows, dimension]."""
        return self.vectors[self.places_of(rows)]

    @property
    def parameters(self) -> dict[str, str | int]:
        finder = self._finder
        if self._is_exact:
            return {"kind": "exact"}
        if isinstance(finder, faiss.IndexHNSW):
            graph = finder.hnsw
            sizes = {"efConstruction": graph.efConstruction, "efSearch": graph.efSearch}
            return {"kind": "hnsw", "M": graph.nb_neighbors(1), **sizes}
        return {"kind": "ivfpq", "nlist": finder.nlist, "nprobe": finder.nprobe, "M": finder.pq.M, "nbits": _CODE_BITS}

    def search(self, questions: np.ndarray, top_k: int) -> Iterator[list[PassageHit]]:
        """The best passages for each question, the best first.

        An exact index has no better passages than these, also where many are equal.

        Args:
            questions: vectors, float32 [questions, dimension].
            top_k: the most hits of a question; there are never more than passages.
        """
        rows_at_once = max(1, _SCORES_AT_ONCE // self._depths(top_k)[1])
        for first in range(0, len(questions), rows_at_once):
            batch = np.ascontiguousarray(questions[first : first + rows_at_once], dtype=np.float32)
            for question, places in zip(batch, self._candidates(batch, top_k), strict=True):
                rows = places if self._rows is None else self._rows[places]
                yield best_hits(rows, self._scores(question, places), top_k, self._precedence)

    def recall(self) -> float:
        """How many of the 10 best passages it finds, as a share.

        The questions are its vectors, also of passages that are gone, evenly spaced, up to 1,000, each moved into a
        random direction by half its length. Vectors of real questions may lie elsewhere.
        """
        count = len(self.vectors)
        vectors = self.vectors[np.linspace(0, count - 1, min(_RECALL_SAMPLE, count)).astype(np.int64)]
        noise = np.random.default_rng(0).standard_normal(vectors.shape)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
        questions = (vectors + 0.5 * lengths * noise).astype(np.float32)
        found = wanted = 0
        exact = DenseIndex(self._flat, self._flat, rows=self._rows)
        searches = (index.search(questions, _RECALL_DEPTH) for index in (self, exact))
        for hits, best in zip(*searches, strict=True):
            found += sum(hit.score >= best[-1].score for hit in hits)  # of equal ones, any will do
            wanted += len(best)
        return found / wanted

    @property
    def _is_exact(self) -> bool:
        return self._finder is self._flat

    def _candidates(self, questions: np.ndarray, top_k: int) -> Iterator[np.ndarray]:
        """For each question places of vectors that may be the best, [candidates]; none of a passage that is gone."""
        if self._is_exact:
            yield from self._exact_candidates(questions, top_k)
            return
        wanted, asked = self._depths(top_k)
        _, places = self._finder.search(questions, asked)
        is_found = places >= 0
        if self._rows is not None:
            is_found &= self._rows[places] >= 0
        is_short = is_found.sum(axis=1) < wanted
        exact = self._exact_candidates(questions[is_short], top_k)
        for of_question, found, short in zip(places, is_found, is_short, strict=True):
            yield next(exact) if short else of_question[found]

    def _depths(self, top_k: int) -> tuple[int, int]:
        """How many candidates of a question are wanted, and how many the finder is asked for."""
        per_hit = _CODED_CANDIDATES if isinstance(self._finder, faiss.IndexIVF) else 1
        wanted = min(per_hit * top_k + _MARGIN, len(self))
        total = self._flat.ntotal
        return wanted, wanted if len(self) == total else min(2 * wanted * total // len(self), total)

    def _exact_candidates(self, questions: np.ndarray, top_k: int) -> Iterator[np.ndarray]:
        """As `_candidates`, where every vector is looked at."""
        wanted = min(top_k + _MARGIN, len(self))
        scores, places = self._flat.search(questions, wanted, params=self._without_what_is_gone)
        if wanted == len(self):
            yield from (of_question[of_question >= 0] for of_question in places)
            return
        # FAISS leaves out any of equal scores, and rounds in ways that depend on the company of a question: the last
        # of its candidates must be clearly worse than the last hit. Else all are asked for that may be as good.
        bounds = scores[:, top_k - 1] - _ROUNDING * np.abs(scores).max(axis=1)
        for question, of_question, bound, last in zip(questions, places, bounds, scores[:, -1], strict=True):
            yield of_question if last < bound else self._places_from(bound, question)

    def _places_from(self, bound: np.float32, question: np.ndarray) -> np.ndarray:
        """Places of all vectors whose score for a question is a number, or greater."""
        below = np.nextafter(bound, np.float32(-np.inf))
        return self._flat.range_search(question[None], below, params=self._without_what_is_gone)[2]

    @cached_property
    def _without_what_is_gone(self) -> "faiss.SearchParameters | None":
        if self._rows is None:
            return None
        return faiss.SearchParameters(sel=faiss.IDSelectorBitmap(np.packbits(self._rows >= 0, bitorder="little")))

    def _scores(self, question: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Inner products, float32 [places]."""
        scores = np.empty(len(places), np.float32)
        at_once = max(1, _SCORES_AT_ONCE // len(question))
        for first in range(0, len(places), at_once):
            part = slice(first, first + at_once)
            scores[part] = (self.vectors[places[part]].astype(np.float64) * question).sum(axis=1)
        return scores


def _new_hnsw(dimension: int) -> "faiss.IndexHNSWFlat":
    index = faiss.IndexHNSWFlat(dimension, 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 200
    return index


def _set_effort(index: "faiss.IndexHNSW") -> None:
    """Let a search look at more where there is more."""
    index.hnsw.efSearch = 64 if index.ntotal <= 100_000 else 128 if index.ntotal <= 1_000_000 else 256


def _build_ivfpq(vectors: "faiss.IndexFlatIP") -> "faiss.IndexIVFPQ":
    count, dimension = vectors.ntotal, vectors.d
    if count < FEWEST_FOR_IVFPQ:
        raise UserError(
            f"{count:,} passages are too few to learn the codes of IVF-PQ from, it takes {FEWEST_FOR_IVFPQ:,}; "
            "use an exact index, which is fast for so few"
        )
    matrix = DenseIndex(vectors, vectors).vectors
    fewest, enough = _TRAINING_PER_LIST
    lists = 2 ** int(math.log2(min(4 * math.sqrt(count), count / fewest)))
    subvectors = next(number for number in range(max(1, dimension // 4), 0, -1) if dimension % number == 0)
    index = faiss.IndexIVFPQ(
        faiss.IndexFlatIP(dimension), dimension, lists, subvectors, _CODE_BITS, faiss.METRIC_INNER_PRODUCT
    )
    sample = np.linspace(0, count - 1, min(count, max(enough * lists, FEWEST_FOR_IVFPQ))).astype(np.int64)
    index.train(matrix[sample])
    index.add(matrix)
    index.nprobe = max(1, lists // 16)
    return index
