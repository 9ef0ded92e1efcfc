"""Search by common terms: BM25 as in Lucene, kept by bm25s (https://github.com/xhluca/bm25s).

The score of a passage is the sum, over the different terms of the question that it has, of

    log(1 + (N - n + 0.5) / (n + 0.5)) * f / (f + k1 * (1 - b + b * length / mean length))

where n of N passages have the term, the passage has it f times, and lengths are counted in terms. Robertson and
Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009; in this form, Kamphuis et al., "Which BM25 Do
You Mean?", 2020.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data.packages import required
from ..errors import UserError
from ..progress import draws_over, progress_bar
from .analysers import Analyser
from .hits import PassageHit, Precedence, best_hits, smaller_row
from .passages import StoredPassages

if TYPE_CHECKING:
    from bm25s import BM25

# Those of Anserini (https://github.com/castorini/anserini); on KorQuAD 1.0 better than 1.2 and 0.75, or 1.5 and 0.75.
K1 = 0.9
B = 0.4

_SHOWS_PROGRESS_FROM = 20_000  # passages: bm25s takes two seconds for about as many, and has no bars that wait


class LexicalIndex:
    """Passages by their terms.

    Args:
        bm25: has their scores.
        analyser: that it was built with.
        precedence: of equal scores.
    """

    def __init__(self, bm25: "BM25", analyser: Analyser, precedence: Precedence = smaller_row):
        self._bm25 = bm25
        self._analyser = analyser
        self._precedence = precedence

    @classmethod
    def build(cls, passages: StoredPassages, analyser: Analyser) -> "LexicalIndex":
        """Index the titles and texts of passages.

        Raises:
            UserError: none of them has a term, or bm25s is not installed.
        """
        bm25 = required("bm25s").BM25(k1=K1, b=B, method="lucene")
        numbers: dict[str, int] = {}  # of terms, in the order of their first occurrence: the same at every build
        terms_of_passages = []
        for passage in progress_bar(passages, desc="taking passages apart", unit=" passages"):
            terms = analyser.terms(f"{passage.title} {passage.text}")
            terms_of_passages.append(array("i", [numbers.setdefault(term, len(numbers)) for term in terms]))
        if not numbers:
            raise UserError("no passage has a word in it; give passages of text")
        shows_progress = len(passages) >= _SHOWS_PROGRESS_FROM
        bm25.index(
            (terms_of_passages, numbers), create_empty_token=False, show_progress=shows_progress and draws_over()
        )
        return cls(bm25, analyser)

    @classmethod
    def load(cls, folder: Path, analyser: Analyser, precedence: Precedence = smaller_row) -> "LexicalIndex":
        """Open what `save` has written: scores are mapped into memory, the vocabulary is read.

        Args:
            folder: where it lies.
            analyser: the one that it was built with.
            precedence: of equal scores.

        Raises:
            UserError: bm25s is not installed.
        """
        return cls(required("bm25s").BM25.load(folder, mmap=True, show_progress=False), analyser, precedence)

    def save(self, folder: Path) -> None:
        """Write it into a folder, which is made."""
        self._bm25.save(folder, show_progress=False)

    def search(self, questions: Iterable[str], top_k: int) -> Iterator[list[PassageHit]]:
        """The best passages for each question, the best first.

        Args:
            questions: texts of any length.
            top_k: the most hits of a question. There are fewer where fewer passages have a term of it, and none where
                the question has no term.
        """
        for question in questions:
            scores = self._scores(self._analyser.terms(question))
            rows = np.flatnonzero(scores)
            yield best_hits(rows, scores[rows], top_k, self._precedence)

    def _scores(self, terms: Sequence[str]) -> np.ndarray:
        """Of all passages, float32 [passages]; 0 for those without any of the terms."""
        return self._bm25.get_scores_from_ids(self._bm25.get_tokens_ids(dict.fromkeys(terms)))
