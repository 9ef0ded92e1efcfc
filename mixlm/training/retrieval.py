"""Training of retrievers: what `run_ict.py` is told, what it learns from, and what a retriever is worth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import Dataset

from ..data.corpus import corpus_files
from ..data.examples import InverseClozeExamples
from ..data.retrieval import (
    EMPTY_PASSAGE,
    ClozePairs,
    EncodedTexts,
    PassageNumbers,
    RetrievalPairs,
    RetrievalTokenizer,
    read_hard_negatives,
    retrieval_questions,
)
from ..data.store import open_corpus
from ..encoder import Encoding, in_order, vectors_by_number
from ..errors import UserError
from ..evaluation.retrieval import ACCURACY_CUTOFFS, query_counts, retrieval_metrics
from .fine_tuning import FineTuningArguments, Questions
from .sharding import Engine

HITS = max(ACCURACY_CUTOFFS)
SCORED_AT_ONCE = 1024  # queries whose scores with all passages are in memory


@dataclass
class RetrievalArguments(FineTuningArguments):
    """What `run_ict.py` takes beside that."""

    best_metric: ClassVar[str | None] = "mrr@10"
    judged_by: ClassVar[tuple[str, ...]] = (
        *("train_file", "dataset_name", "dataset_config_name", "train_articles", "validation_file"),
        *("validation_articles", "validation_split", "corpus_path", "eval_split", "max_eval_examples"),
        *("max_query_length", "max_passage_length", "null_passage"),
    )
    ordered_by: ClassVar[tuple[str, ...]] = (
        *(*FineTuningArguments.ordered_by, "null_passage", "eval_split", "max_query_length", "max_passage_length"),
    )

    # Text without questions
    corpus_path: str | None = field(
        default=None,
        metadata={
            "help": "Instead of questions: folder or file of .dat, .dat.xz, .dat.gz. A sentence asks for the text "
            "around it (inverse cloze task)."
        },
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where the tokenized corpus is kept. None = MIXLM_CACHE or ~/.cache/mixlm."}
    )
    eval_split: float = field(default=0.01, metadata={"help": "Share of the corpus's documents to evaluate on."})
    max_eval_examples: int = field(default=1000, metadata={"help": "Evaluate on at most this many of its sentences."})
    remove_query_probability: float = field(
        default=0.9, metadata={"help": "Corpus: how often a sentence is removed from the text around it."}
    )

    # The encoder
    max_query_length: int = field(
        default=Encoding.max_query_length, metadata={"help": "Tokens of a question; a longer one is cut."}
    )
    max_passage_length: int = field(
        default=Encoding.max_passage_length, metadata={"help": "Tokens of a passage with its title, likewise."}
    )
    pooler: Literal["decoder", "mean", "cls"] | None = field(
        default=None, metadata={"help": "How a text becomes one vector. None = as the model has it."}
    )
    normalize: bool = field(
        default=False,
        metadata={"help": "Divide vectors by their norms: cosines. A model that does so keeps it."},
    )
    two_towers: bool = field(
        default=False,
        metadata={"help": "An encoder for passages beside that for questions. A model that has two keeps them."},
    )

    # What is learned
    temperature: float = field(default=1.0, metadata={"help": "Scores are divided by it. Cosines need about 0.05."})
    cache_chunk: int | None = field(
        default=None,
        metadata={
            "help": "Gradient caching: rows of one forward pass, into which train_batch_size is cut; memory is that "
            "of a chunk, negatives and gradient those of the batch. None = the batch at once."
        },
    )
    hard_negatives: str | None = field(
        default=None,
        metadata={"help": 'JSON lines {"id": question, "negatives": [{"title": ..., "text": ...}]}, as `mixlm mine`.'},
    )
    num_hard_negatives: int = field(default=1, metadata={"help": "How many of them to take for each question."})
    null_passage: bool = field(
        default=False,
        metadata={"help": "Train unanswerable questions towards a passage without text, which every batch has."},
    )

    def __post_init__(self):
        super().__post_init__()
        sources = (self.train_file, self.dataset_name, self.corpus_path)
        if sum(source is not None for source in sources) != 1:
            raise UserError("give one of --train_file, --dataset_name (questions) and --corpus_path (text)")
        self.require(0 < self.temperature < float("inf"), "temperature", "above 0 and finite")
        self.require(0 < self.eval_split < 1, "eval_split", "between 0 and 1")
        self.require(0 <= self.remove_query_probability <= 1, "remove_query_probability", "from 0 to 1")
        at_least = {"max_query_length": 3, "max_passage_length": 8, "num_hard_negatives": 1, "max_eval_examples": 1}
        for name, least in at_least.items():
            self.require(getattr(self, name) >= least, name, f"at least {least}")
        if self.corpus_path is not None:
            for name in ("hard_negatives", "validation_file", "train_articles", "validation_articles"):
                self.require(getattr(self, name) is None, name, "left out with corpus_path")
            self.require(not self.null_passage, "null_passage", "left out with corpus_path")
            rule = f"at most max_passage_length={self.max_passage_length} with corpus_path"
            self.require(self.max_query_length <= self.max_passage_length, "max_query_length", rule)
        if self.cache_chunk is not None:
            self.require(self.cache_chunk >= 1, "cache_chunk", "at least 1")
            is_alone = self.gradient_accumulation_steps == 1 and self.effective_batch_size is None
            self.require(is_alone, "cache_chunk", "left out with another way to cut the batch")
            is_whole = self.train_batch_size > 0 and self.train_batch_size % self.cache_chunk == 0
            self.require(is_whole, "train_batch_size", f"a multiple of cache_chunk={self.cache_chunk}")
            # From here on it is what the loop calls accumulation.
            self.gradient_accumulation_steps = self.train_batch_size // self.cache_chunk
            self.train_batch_size, self.cache_chunk = self.cache_chunk, None

    def data_sources(self) -> dict[str, list[Path] | str]:
        sources = super().data_sources()
        if self.corpus_path is not None:
            sources["corpus_path"] = corpus_files(self.corpus_path)
        if self.hard_negatives is not None:
            sources["hard_negatives"] = [Path(self.hard_negatives)]
        return sources

    @property
    def model_fields(self) -> dict[str, Any]:
        """Fields of the model's configuration that are asked for."""
        asked = {"pooler": self.pooler, "normalize_embeddings": self.normalize, "two_towers": self.two_towers}
        return {name: value for name, value in asked.items() if value}

    @property
    def encoding(self) -> Encoding:
        """How texts become token ids."""
        return Encoding(self.max_query_length, self.max_passage_length, self.null_passage)


@dataclass(frozen=True)
class RetrievalData:
    """What a retriever learns from and is judged by.

    Args:
        training: pairs, as `RetrievalObjective` takes them.
        queries: to evaluate with; one of them at least has an answer.
        passages: all that are searched.
        relevant: of each query the passage that answers it, or `EMPTY_PASSAGE`.
        hard_negatives: how many the pairs have in all.
    """

    training: Dataset
    queries: EncodedTexts
    passages: EncodedTexts
    relevant: Sequence[int]
    hard_negatives: int = 0


def pairs_of_questions(
    arguments: RetrievalArguments, questions: Questions, tokenizer: RetrievalTokenizer
) -> RetrievalData:
    """Training questions with their paragraphs; the validation questions search all paragraphs that were read.

    Hard negatives from elsewhere are not searched: metrics with and without them are of the same task.

    Raises:
        UserError: the hard negatives are not of these questions; no validation question has an answer.
    """
    negatives: Mapping[str, Sequence[tuple[str, str]]] = {}
    if arguments.hard_negatives is not None:
        negatives = read_hard_negatives(arguments.hard_negatives)
        if not any(example.id in negatives for example in questions.training):
            raise UserError(f"--hard_negatives {arguments.hard_negatives}: no question to train on is in there")
    number_of = PassageNumbers()
    for example in questions.everything:
        number_of(example.title, example.context)
    searched = len(number_of.passages)
    training = retrieval_questions(questions.training, number_of, negatives, arguments.num_hard_negatives)
    validation = retrieval_questions(questions.validation, number_of, {}, 0)
    if all(question.passage == EMPTY_PASSAGE for question in validation):
        raise UserError("no question to evaluate on has an answer; choose others")
    passages = tokenizer.passages(number_of.passages)
    return RetrievalData(
        RetrievalPairs(
            training,
            tokenizer.queries([question.text for question in training]),
            passages,
            tokenizer.empty_passage,
        ),
        EncodedTexts(tokenizer.queries([question.text for question in validation])),
        EncodedTexts(passages[:searched]),
        [question.passage for question in validation],
        hard_negatives=sum(len(question.hard_negatives) for question in training),
    )


def pairs_of_corpus(arguments: RetrievalArguments, tokenizer, texts: RetrievalTokenizer) -> RetrievalData:
    """Sentences with the text around them; of held-out documents the sentence is never in the text."""
    room = arguments.max_passage_length - InverseClozeExamples.special_tokens
    corpus = open_corpus(
        arguments.corpus_path,
        tokenizer,
        max_sentence_length=arguments.max_query_length - InverseClozeExamples.special_tokens,
        cache_dir=arguments.cache_dir,
    )
    blocks = corpus.blocks(room)
    is_held_out = corpus.held_out(arguments.eval_split)[blocks[:, 0]]
    ids = (texts.cls, texts.sep, arguments.max_passage_length)
    training = ClozePairs(corpus, blocks[~is_held_out], *ids, arguments.seed, arguments.remove_query_probability)
    held_out = ClozePairs(corpus, blocks[is_held_out], *ids, 0, 1.0)
    held_out.limit(arguments.max_eval_examples)
    if not len(held_out):
        raise UserError(f"--eval_split={arguments.eval_split}: no held-out document has two sentences; hold out more")
    examples = [held_out[0, index] for index in range(len(held_out))]
    return RetrievalData(
        training,
        EncodedTexts([example["input_ids"] for example in examples]),
        EncodedTexts([example["context_input_ids"] for example in examples]),
        range(len(examples)),
    )


def evaluate_retrieval(
    engine: Engine, data: RetrievalData, rows: int, tokenizer: RetrievalTokenizer, accelerator: Accelerator
) -> dict[str, float]:
    """Search all passages with all queries.

    Args:
        engine: of a ForRetrieval model, in evaluation mode.
        data: queries, passages, and what belongs together.
        rows: of a batch.
        tokenizer: of the texts.
        accelerator: the ranks share the encoding, and all get the metrics.

    Returns:
        `retrieval_metrics` over the queries that have an answer, by passage. If there are others, `no_answer_accuracy`
        too: how often the passage without text scores higher than all others exactly where there is no answer, in
        percent.
    """

    def encode(texts: EncodedTexts, are_passages: bool) -> np.ndarray:
        rank, ranks = accelerator.process_index, accelerator.num_processes
        own = vectors_by_number(
            engine, accelerator.device, texts, rows, tokenizer.pad_token_id, are_passages, rank, ranks
        )
        return in_order(gather_object(list(own)))

    queries, passages = encode(data.queries, False), encode(data.passages, True)
    has_none = np.array(data.relevant) == EMPTY_PASSAGE
    empty = None
    if has_none.any():
        empty = encode(EncodedTexts([tokenizer.empty_passage] * accelerator.num_processes), True)[0]
    # One rank searches for all.
    found = [search_metrics(queries, passages, data.relevant, empty) if accelerator.is_main_process else None]
    return broadcast_object_list(found)[0]


def search_metrics(
    queries: np.ndarray, passages: np.ndarray, relevant: Sequence[int], empty_passage: np.ndarray | None = None
) -> dict[str, float]:
    """The metrics of `evaluate_retrieval`.

    Args:
        queries: vectors, [queries, hidden].
        passages: vectors, [passages, hidden].
        relevant: of each query the number of its passage, or `EMPTY_PASSAGE`.
        empty_passage: vector of the passage without text, [hidden]; needed where a query has no passage.
    """
    hits = {
        str(number): list(zip(map(str, best.tolist()), scores.tolist(), strict=True))
        for number, (best, scores) in enumerate(best_passages(queries, passages, HITS))
        if relevant[number] != EMPTY_PASSAGE
    }
    qrels = {query: {str(relevant[int(query)]): 1} for query in hits}
    metrics = retrieval_metrics(hits, qrels)
    for count in query_counts(hits, qrels):
        del metrics[count]
    if empty_passage is not None:
        best_scores = np.array([scores[0] for _, scores in best_passages(queries, passages, 1)])
        says_none = queries @ empty_passage > best_scores
        has_none = np.array(relevant) == EMPTY_PASSAGE
        metrics["no_answer_accuracy"] = 100 * float(np.mean(says_none == has_none))
    return metrics


def best_passages(queries: np.ndarray, passages: np.ndarray, count: int):
    """For each query the numbers and the inner products of its `count` best passages, the best first.

    Args:
        queries: [queries, hidden].
        passages: [passages, hidden].
        count: at most as many as there are.
    """
    count = min(count, len(passages))
    for first in range(0, len(queries), SCORED_AT_ONCE):
        for scores in queries[first : first + SCORED_AT_ONCE] @ passages.T:
            found = np.argpartition(-scores, count - 1)[:count]
            found = found[np.argsort(-scores[found], kind="stable")]
            yield found, scores[found]
