"""Finding passages for questions by vectors, or by vectors and terms. By terms alone, an `Index` finds them itself."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat

import numpy as np

from ..encoder import MixLMEncoder
from ..errors import UserError
from ..evaluation.retrieval import Qrels, mean_percent, reciprocal_rank
from .fusion import fuse
from .hits import Found, PassageHit
from .index import Index
from .shards import ShardedIndex
from .vectors import difference

WEIGHTS = tuple(number / 10 for number in range(11))  # of the dense scores, among which `tune` chooses
CANDIDATES = 200  # of either ranking, that hybrid search brings together

_QUESTIONS_AT_ONCE = 1024  # that are encoded before the first of them is searched
_VERIFIED = 64
_VERIFY_TOLERANCE = 0.01  # of a vector's length: other devices round otherwise, other models are far off


class Search:
    """Searches an index with an encoder. A question of blanks alone has no hits.

    Args:
        index: an open index, or several of them, which have no `hybrid`.
        encoder: of the questions.

    Raises:
        UserError: the index has no vectors, or they are of another encoder.
    """

    def __init__(self, index: Index | ShardedIndex, encoder: MixLMEncoder):
        self.index, self._encoder = index, encoder
        if index.dense is None:
            raise UserError(f"{index.folder}: has no vectors to search by; build it with mixlm index --vectors")
        if (other := difference(index.manifest["dense"]["encoder"], encoder.fingerprint())) is not None:
            raise UserError(
                f"{index.folder}: was built with another encoder: {other}; give the model that encoded its passages, "
                "or encode them again into another folder and build an index with that"
            )
        self._empty_passage = encoder.encode_empty_passage() if encoder.encoding.null_passage else None

    def dense(self, questions: Sequence[str], top_k: int) -> Iterator[Found]:
        """The best passages for each question by vectors; see `DenseIndex.search`."""
        for first in range(0, len(questions), _QUESTIONS_AT_ONCE):
            batch = questions[first : first + _QUESTIONS_AT_ONCE]
            vectors = self._encoder.encode_queries([question for question in batch if question.strip()])
            found = map(_found, self.index.dense.search(vectors, top_k), self._empty_scores(vectors))
            yield from (next(found) if question.strip() else Found([]) for question in batch)

    def hybrid(self, questions: Sequence[str], top_k: int) -> Iterator[Found]:
        """The best passages for each question by both: see `fuse`, with the weight that the index has, if any.

        The first 200 of either ranking are brought together; with a greater `top_k`, so many.
        """
        for dense, lexical in self._rankings(questions, max(top_k, CANDIDATES)):
            yield dense._replace(
                hits=fuse(dense.hits, lexical, self.index.weight, top_k, self.index.passages.id_of_row)
            )

    def tune(self, queries: Mapping[str, str], qrels: Qrels) -> dict[float | None, float]:
        """How good hybrid search is.

        Args:
            queries: texts by id.
            qrels: the grades of passages by query id; queries without any are left out.

        Returns:
            MRR@10 in percent by weight, and of reciprocal rank fusion as that of None.

        Raises:
            UserError: no query is judged, none has a relevant passage, or the index has none of these.
        """
        judged = [query for query in queries if query in qrels]
        if not judged:
            raise UserError("no query is judged; give queries and judgements with the same ids")
        id_of_row = self.index.passages.id_of_row
        relevant = {passage for query in judged for passage, grade in qrels[query].items() if grade > 0}
        if not relevant:
            raise UserError("no query has a relevant passage; give judgements with grades of 1 or more")
        if not self.index.passages.has_any(relevant):
            raise UserError(
                f"{self.index.folder}: has no passage that is relevant by the judgements ('{id_of_row(0)}' is in the "
                f"index, and '{min(relevant)}' in the judgements); give judgements with its ids"
            )
        scores: dict[float | None, dict[str, float]] = {weight: {} for weight in (None, *WEIGHTS)}
        rankings = self._rankings([queries[query] for query in judged], CANDIDATES)
        for query, (dense, lexical) in zip(judged, rankings, strict=True):
            for weight, of_weight in scores.items():
                hits = fuse(dense.hits, lexical, weight, 10, id_of_row)
                passages = [id_of_row(row) for row, _ in hits]
                of_weight[query] = reciprocal_rank(passages, qrels[query], cutoff=10)
        return {weight: mean_percent(of_weight) for weight, of_weight in scores.items()}

    def verify(self) -> int:
        """Encode up to 64 passages again, and compare their vectors with those of the index.

        Returns:
            How many.

        Raises:
            UserError: they are not the same.
        """
        count = len(self.index.dense)
        rows = np.linspace(0, count - 1, min(_VERIFIED, count)).astype(np.int64)
        vectors = self._encoder.encode_passages([self.index.passages[row] for row in rows.tolist()])
        lengths = np.linalg.norm(vectors, axis=1)
        is_off = ~(np.linalg.norm(vectors - self.index.dense.vectors_of(rows), axis=1) <= _VERIFY_TOLERANCE * lengths)
        if is_off.any():
            passage = self.index.passages.id_of_row(int(rows[is_off.argmax()]))
            raise UserError(
                f"{self.index.folder}: {is_off.sum()} of {len(rows)} passages, such as '{passage}', have vectors that "
                "the encoder does not give now; encode them into a new folder, and build the index again"
            )
        return len(rows)

    def _empty_scores(self, vectors: np.ndarray) -> Iterable[float | None]:
        """The score of the passage without text for each question, as the index has those of its passages."""
        if self._empty_passage is None:
            return repeat(None)
        return (vectors.astype(np.float64) * self._empty_passage).sum(axis=1).astype(np.float32).tolist()

    def _rankings(self, questions: Sequence[str], depth: int) -> Iterator[tuple[Found, list[PassageHit]]]:
        return zip(self.dense(questions, depth), self.index.lexical.search(questions, depth), strict=True)


def _found(hits: list[PassageHit], empty_score: float | None) -> Found:
    if empty_score is None:
        return Found(hits)
    return Found(hits, empty_score, has_answer=bool(hits) and hits[0].score > empty_score)


def best_weight(scores: Mapping[float | None, float]) -> float | None:
    """The weight with the best score; of equal ones, that nearest to 0.5. None only where it alone is the best."""
    weight = max(WEIGHTS, key=lambda weight: (scores[weight], -abs(weight - 0.5)))
    return weight if scores[weight] >= scores[None] else None
