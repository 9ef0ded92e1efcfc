"""Answering questions from a collection: passages are found, read, and the best answer of all is chosen.

from pathlib import Path

from mixlm.open_qa import OpenQA
from mixlm.reader import MixLMReader
from mixlm.retrieval.index import open_index

answering = OpenQA(open_index(Path("my-index")), MixLMReader.from_pretrained("my-reader"))
answering.answer("세종대왕은 언제 태어났나?").text
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from .data.passages import Passage
from .data.reading import Reading
from .data.squad import ReadingExample
from .errors import UserError
from .loading import hash_of_weights
from .progress import progress_bar
from .reader import MixLMReader
from .retrieval.fusion import normalised
from .retrieval.hits import Find, Found
from .retrieval.index import Index
from .retrieval.search import Search
from .retrieval.shards import ShardedIndex
from .retrieval.vectors import difference

WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # of the retriever, among which `tune` chooses

_QUESTIONS_AT_ONCE = 32  # whose passages are read together: they share batches


class Candidate(NamedTuple):
    """The best answer that one passage has: `passage.text[start:end] == text`, in characters.

    Attributes:
        text: "" where the reader finds nothing in the passage that can be an answer; its score then means nothing.
        passage: that was found, and read.
        start, end: of the answer in its text.
        reader_score: the sum of the answer's two logits; of a reader that knows "no answer", by how much that is more
            than its sum for "no answer".
        retriever_score: of the passage, from 1 for the best that was found for the question to 0 for the worst.
    """

    text: str
    passage: Passage
    start: int
    end: int
    reader_score: float
    retriever_score: float


class ReadPassages(NamedTuple):
    """What was found and read for a question.

    Attributes:
        candidates: of each passage, in the order in which these were found.
        has_answer: whether the retriever thinks that one of them answers the question; None if it cannot say.
    """

    candidates: list[Candidate]
    has_answer: bool | None = None


@dataclass(frozen=True)
class Choice:
    """How one answer is chosen among those of several passages, unless the retriever says that there is none.

    The best is the one with the greatest reader_score + weight * retriever_score, as in BERTserini (Yang et al., "End-
    to-End Open-Domain Question Answering with BERTserini", 2019, section 3), but for how the scores are scaled.

    Args:
        weight: of the retriever.
        threshold: the reader score below which there is no answer; None is that of the reader: its null threshold, or
            none if it always answers.
    """

    weight: float = 2.0
    threshold: float | None = None

    def score(self, candidate: Candidate) -> float:
        """How good a candidate is beside the others of its question."""
        return candidate.reader_score + self.weight * candidate.retriever_score


class OpenAnswer(NamedTuple):
    """The answer to a question.

    Attributes:
        text: "" for "no answer".
        candidates: of all passages that were read, from the best to the worst, and then those without text; the first
            is the answer, if there is one.
    """

    text: str
    candidates: list[Candidate]

    def record(self, question: str) -> dict[str, Any]:
        """It as JSON has it, with the question: "answer" is its text."""
        candidates = [{**each._asdict(), "passage": each.passage._asdict()} for each in self.candidates]
        return {"question": question, "answer": self.text, "candidates": candidates}


class OpenQA:
    """Answers questions from the passages of an index.

    Args:
        index: where passages are found; in several indexes only by a `search` with the mode "dense".
        reader: reads them.
        search: finds them by vectors, in this index; None is lexical search.
        mode: of `search`: "dense" or "hybrid".
        top_k: how many passages are read for a question.
        choice: how the answer is chosen; None is what `store` has stored in the index, if that was tuned under what is
            the case now.

    Raises:
        ValueError: `search` has no such mode.

    Attributes:
        mode: how passages are found: "lexical", "dense" or "hybrid".
        unused: why what is stored in the index is not used, though no `choice` was given; else None.
    """

    def __init__(
        self,
        index: Index | ShardedIndex,
        reader: MixLMReader,
        search: Search | None = None,
        mode: str = "hybrid",
        top_k: int = 10,
        choice: Choice | None = None,
    ):
        self.index, self.reader, self.top_k = index, reader, top_k
        if search is not None and mode not in ("dense", "hybrid"):
            raise ValueError(f"mode={mode!r} must be 'dense' or 'hybrid'; leave the search out for a lexical one")
        self.search, self.mode = search, "lexical" if search is None else mode
        self.find: Find = index.find if search is None else getattr(search, mode)
        self.unused: str | None = None
        self.choice = choice or self._stored_choice()

    def answer(self, question: str) -> OpenAnswer:
        """The answer to one question."""
        return next(self.answers([question]))

    def answers(self, questions: Sequence[str]) -> Iterator[OpenAnswer]:
        """The answer to each question."""
        return (self.choose(passages, self.choice) for passages in self.read(questions))

    def read(self, questions: Sequence[str]) -> Iterator[ReadPassages]:
        """What is found and read for each question."""
        with progress_bar(desc="answering", total=len(questions), unit=" questions") as progress:
            for first in range(0, len(questions), _QUESTIONS_AT_ONCE):
                asked = questions[first : first + _QUESTIONS_AT_ONCE]
                yield from self._read(asked, list(self.find(asked, self.top_k)))
                progress.update(len(asked))

    def choose(self, passages: ReadPassages, choice: Choice) -> OpenAnswer:
        """The answer to a question; of equally good ones, that of the passage that was found first."""
        # What has no text is last: it would else stand before answers whose logits are negative.
        ranked = sorted(passages.candidates, key=lambda each: (bool(each.text), choice.score(each)), reverse=True)
        is_sure = bool(ranked) and ranked[0].reader_score >= self._threshold(choice)
        return OpenAnswer(ranked[0].text if is_sure and passages.has_answer is not False else "", ranked)

    def tune(
        self,
        examples: Sequence[ReadingExample],
        passages: Sequence[ReadPassages],
        f1: Callable[[str, Sequence[str]], float],
    ) -> dict[Choice, float]:
        """How good the answers are by weight, and with unanswerable questions each with the threshold that suits it.

        Args:
            examples: questions with their reference answers; an unanswerable one has none.
            passages: of each, as `read` returns them.
            f1: of an answer and its references, from 0 to 1; of "" without references 1.

        Returns:
            F1 in percent by choice.

        Raises:
            UserError: there are no questions.
        """
        if not examples:
            raise UserError("no question to tune with; give some with their answers")
        has_unanswerable = any(example.is_impossible for example in examples)
        found = {}
        for weight in WEIGHTS:
            always = Choice(weight, threshold=-math.inf)
            values = []  # reader score, F1 of the answer, F1 of "no answer"; of questions that can be answered
            of_others = []  # F1 of "no answer" of the others, of which no threshold makes any difference
            for example, of_question in zip(examples, passages, strict=True):
                answer, of_none = self.choose(of_question, always), f1("", example.answer_texts)
                if answer.text:
                    values.append((answer.candidates[0].reader_score, f1(answer.text, example.answer_texts), of_none))
                else:
                    of_others.append(of_none)
            choice = Choice(weight, _best_threshold(values) if has_unanswerable and values else None)
            lowest = self._threshold(choice)
            of_answers = (own if score >= lowest else of_none for score, own, of_none in values)
            found[choice] = 100 * math.fsum((*of_others, *of_answers)) / len(examples)
        return found

    def store(self, choice: Choice, f1: float) -> None:
        """Choose by it from now on, also whenever this index is searched and read in the same way.

        Args:
            choice: the best of `tune`.
            f1: of it, in percent; written down beside it.

        Raises:
            UserError: it cannot be written into the index.
        """
        self.choice = choice
        self.index.store_tuning("answers", {**asdict(choice), "f1": round(f1, 4), **self._circumstances()})

    def _circumstances(self) -> dict[str, Any]:
        """All that the scores of candidates depend on: a choice that is tuned under others says nothing of them."""
        return {
            "passages": len(self.index.passages),  # of several indexes, more than of the one that has the choice
            "mode": self.mode,
            "hybrid_weight": self.index.weight if self.mode == "hybrid" else None,
            "top_k": self.top_k,
            "reader": hash_of_weights(self.reader.model),
            **asdict(self.reader.decoding),
        }

    def _stored_choice(self) -> Choice:
        if (stored := self.index.manifest.get("answers")) is None:
            return Choice()
        if (other := difference(stored, self._circumstances())) is not None:
            self.unused = f"what is tuned in {self.index.folder} is not used, because {other}"
            return Choice()
        return Choice(stored["weight"], stored["threshold"])

    def _threshold(self, choice: Choice) -> float:
        if choice.threshold is not None:
            return choice.threshold
        decoding = self.reader.decoding
        return -decoding.null_threshold if decoding.unanswerable else -math.inf

    def _read(self, questions: Sequence[str], found: Sequence[Found]) -> Iterator[ReadPassages]:
        """Of each question the best answer in each of its passages."""
        hits = [[(self.index.passages[row], score) for row, score in normalised(each.hits).items()] for each in found]
        examples = [
            ReadingExample(f"{number}", passage.title, passage.text, question, (), (), is_impossible=True, article=0)
            for number, (question, passages) in enumerate(zip(questions, hits, strict=True))
            for passage, _ in passages
        ]
        readings = self.reader.read(examples) if examples else iter(())
        for passages, of_question in zip(hits, found, strict=True):
            candidates = [_candidate(passage, next(readings), score) for passage, score in passages]
            yield ReadPassages(candidates, of_question.has_answer)


def _candidate(passage: Passage, reading: Reading, retriever_score: float) -> Candidate:
    """What a reading says of a passage."""
    # Whether there is an answer is decided over all passages: here the best span counts, also below "no answer".
    span = next((each for each in reading.candidates if each.text), reading.candidates[0])
    score = span.score if reading.null_odds is None else -reading.null_odds
    return Candidate(span.text, passage, span.start_char, span.end_char, score, retriever_score)


def _best_threshold(values: Sequence[tuple[float, float, float]]) -> float:
    """The score from which on answering is worth most; of equals the least, so that more is answered.

    Args:
        values: of each question, at least one, the reader score of its answer, what the answer is worth, and what none
            is worth.
    """
    ordered = sorted(values, reverse=True)
    gain, best_gain, best = 0.0, 0.0, ordered[0][0] + 1  # which nothing reaches
    for place, (score, own, of_none) in enumerate(ordered):
        gain += own - of_none
        is_last_of_equals = place + 1 == len(ordered) or ordered[place + 1][0] < score
        if is_last_of_equals and gain >= best_gain:
            best_gain, best = gain, score
    return best


def best_choice(scores: Mapping[Choice, float]) -> Choice:
    """The choice with the best F1; of equal ones, that with the smallest weight."""
    return max(scores, key=lambda choice: (scores[choice], -choice.weight))
