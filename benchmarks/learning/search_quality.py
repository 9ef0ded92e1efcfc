"""What an encoder is worth in an index: passages found by terms, by its vectors, and by both.

What `mixlm index`, `tune`, `search` and `evaluate --compare` do, in one process, and for a peer's encoder too.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mixlm.data.passages import Passage, read_passages
from mixlm.encoder import MixLMEncoder
from mixlm.evaluation.retrieval import answer_scores, mean_percent, paired_difference, ranking_scores
from mixlm.evaluation.retrieval_files import read_queries, read_squad_judgements
from mixlm.retrieval.analysers import BigramAnalyser
from mixlm.retrieval.index import build_index, open_index
from mixlm.retrieval.search import Search, best_weight

DEPTH = 100  # hits of a question


class EncodedCollection:
    """Passages and their vectors in memory, as `build_index` takes those of a folder.

    Args:
        encoder: of the passages.
        collection: the passages, each with its own id.
    """

    model, dtype = "in memory", "float32"

    def __init__(self, encoder: MixLMEncoder, collection: Sequence[Passage]):
        self.encoder, self._collection = encoder.fingerprint(), collection
        self._vectors = encoder.encode_passages(collection)
        self.dimension = self._vectors.shape[1]

    def __len__(self) -> int:
        return len(self._collection)

    def passages(self) -> Iterator[Passage]:
        """The passages, in order."""
        yield from self._collection

    def shards(self) -> Iterator[np.ndarray]:
        """Their vectors, [passages, dimension], at once."""
        yield self._vectors


def search_quality(
    encoder: MixLMEncoder, file: Path, folder: Path, tuned_on: str | None, judged_on: str | None
) -> dict[str, float]:
    """Search all paragraphs of a SQuAD-style file with its questions.

    Args:
        encoder: of questions and paragraphs.
        file: the SQuAD-style file.
        folder: for the index.
        tuned_on: articles whose questions choose the weight of hybrid search; None for reciprocal rank fusion.
        judged_on: articles whose questions are judged; None for all.

    Returns:
        In percent, under names such as `dense/accuracy@1`: the metrics of `mixlm evaluate` by paragraph, and with
        `answer_` before them where a paragraph with the answer's text counts. `gain/NAME` is by how many points
        hybrid search is better than terms alone, and `p/NAME` how probable that would be if they were alike. `weight`
        is that of the dense scores, if one was chosen.
    """
    collection = list(read_passages([file]))
    build_index(collection, folder, BigramAnalyser(), EncodedCollection(encoder, collection))
    index = open_index(folder)
    search, queries = Search(index, encoder), read_queries(file)
    metrics: dict[str, float] = {}
    if tuned_on is not None:
        scores = search.tune(queries, read_squad_judgements(file, tuned_on)[0])
        index.store_tuning("hybrid", {"weight": best_weight(scores)})
        if index.weight is not None:
            metrics["weight"] = index.weight
    qrels, answers = read_squad_judgements(file, judged_on)
    questions = {query: queries[query] for query in qrels}
    texts = {passage.id: passage.text for passage in collection}
    by_mode: dict[str, dict[str, Mapping[str, float]]] = {}
    for mode, find in {"lexical": index.find, "dense": search.dense, "hybrid": search.hybrid}.items():
        of_questions = zip(questions, find(list(questions.values()), DEPTH), strict=True)
        ids = index.passages.id_of_row
        hits = {question: [(ids(row), score) for row, score in found.hits] for question, found in of_questions}
        by_answer = answer_scores(hits, texts, answers)
        by_mode[mode] = ranking_scores(hits, qrels) | {f"answer_{name}": each for name, each in by_answer.items()}
    for mode, scores in by_mode.items():
        metrics.update((f"{mode}/{name}", mean_percent(of_queries)) for name, of_queries in scores.items())
    for name, of_queries in by_mode["hybrid"].items():
        difference = paired_difference(of_queries, by_mode["lexical"][name])
        metrics[f"gain/{name}"], metrics[f"p/{name}"] = difference.mean, difference.p_value
    return metrics
