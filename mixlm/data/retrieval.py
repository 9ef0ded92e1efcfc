"""Questions and the passages that answer them, as token ids: what a retriever learns from, and what it encodes."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from ..errors import UserError, one_line
from ..progress import progress_bar
from .cutting import text_backend
from .examples import InverseClozeExamples
from .json_lines import read_json_lines
from .passages import Passage
from .squad import ReadingExample

ENCODE_BATCH = 1000  # texts that are tokenized at once
EMPTY_PASSAGE = -1  # the number of the passage without text, to which unanswerable questions belong


@dataclass(frozen=True)
class RetrievalQuestion:
    """A question and the passages it is trained with, by their numbers.

    Attributes:
        text: what is asked.
        passage: the passage that answers it, or `EMPTY_PASSAGE`.
        hard_negatives: passages that are like it and do not answer it.
    """

    text: str
    passage: int
    hard_negatives: tuple[int, ...] = ()


class RetrievalTokenizer:
    """Texts as a retriever sees them.

    A query is [CLS] query [SEP]; a passage [CLS] title [SEP] text [SEP], as in DPR (arXiv:2004.04906, section 3), or
    [CLS] text [SEP] where it has no title. All are composed to NFC first. What is too long is cut at its end.

    Args:
        tokenizer: any fast tokenizer with [CLS] and [SEP].
        max_query_length: most tokens of a query, special ones included.
        max_passage_length: likewise of a passage.

    Attributes:
        normal_form: of Unicode, what texts are composed to.
    """

    normal_form = "NFC"  # vectors of texts in another form are other vectors: see `MixLMEncoder.fingerprint`

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_query_length: int = 64, max_passage_length: int = 256):
        self.pad_token_id = tokenizer.pad_token_id
        self.cls, self.sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.max_query_length, self.max_passage_length = max_query_length, max_passage_length
        self.backend = text_backend(tokenizer.backend_tokenizer)

    @property
    def empty_passage(self) -> np.ndarray:
        """The passage without text."""
        return np.array([self.cls, self.sep])

    def queries(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each query, [length]."""
        return [self._cut(self._joined(ids), self.max_query_length) for ids in self._encode(texts, "queries")]

    def passages(self, passages: Sequence[Passage]) -> list[np.ndarray]:
        """The token ids of each passage, [length]."""
        return [self._cut(ids, self.max_passage_length) for ids in self._whole(passages)]

    def passage_lengths(self, passages: Sequence[Passage]) -> np.ndarray:
        """Tokens of each passage, before it is cut: [passages]."""
        return np.array([len(ids) for ids in self._whole(passages)])

    def _whole(self, passages: Sequence[Passage]) -> list[list[int]]:
        titles = self._encode([passage.title for passage in passages], "titles")
        texts = self._encode([passage.text for passage in passages], "passages")
        return [
            self._joined(title, text) if title else self._joined(text)
            for title, text in zip(titles, texts, strict=True)
        ]

    def _joined(self, *parts: list[int]) -> list[int]:
        ids = [self.cls]
        for part in parts:
            ids += [*part, self.sep]
        return ids

    def _cut(self, ids: list[int], longest: int) -> np.ndarray:
        return np.array(ids if len(ids) <= longest else [*ids[: longest - 1], self.sep])

    def _encode(self, texts: Sequence[str], unit: str) -> list[list[int]]:
        encoded: list[list[int]] = []
        with progress_bar(desc=f"tokenizing {unit}", total=len(texts), unit=f" {unit}", leave=False) as progress:
            for first in range(0, len(texts), ENCODE_BATCH):
                # A vocabulary has syllables, and not the letters that decomposed ones consist of.
                batch = [unicodedata.normalize(self.normal_form, text) for text in texts[first : first + ENCODE_BATCH]]
                encoded += [
                    encoding.ids for encoding in self.backend.encode_batch_fast(batch, add_special_tokens=False)
                ]
                progress.update(len(batch))
        return encoded


class EncodedTexts(Dataset):
    """Texts to be turned into vectors: an item has `input_ids` [length] and `number`, its index.

    Args:
        texts: token ids of each, [length].

    Attributes:
        lengths: tokens of each, [texts].
    """

    def __init__(self, texts: Sequence[np.ndarray]):
        self.texts = texts
        self.lengths = np.array([len(ids) for ids in texts], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, np.ndarray | int]:
        """The text of `key` = (epoch, index)."""
        _, index = key
        return {"input_ids": self.texts[index], "number": index}


class RetrievalPairs(Dataset):
    """Questions with their passages, as `RetrievalObjective` takes them.

    An item has `input_ids` [length] of the question; `context_input_ids`, a list with its passage and its hard
    negatives; and the numbers of these as `passage` and the list `context_passage`.

    Args:
        questions: what is asked.
        queries: token ids of each question, [length].
        passages: token ids of all passages, [length]; a question names them by their numbers.
        empty_passage: token ids of the passage without text.

    Attributes:
        lengths: tokens of each question with its longest passage, [questions].
    """

    def __init__(
        self,
        questions: Sequence[RetrievalQuestion],
        queries: Sequence[np.ndarray],
        passages: Sequence[np.ndarray],
        empty_passage: np.ndarray,
    ):
        self.questions, self._queries = questions, queries
        self._passages = {EMPTY_PASSAGE: empty_passage, **dict(enumerate(passages))}
        self.lengths = np.array(
            [
                len(query) + max(len(self._passages[number]) for number in _numbers(question))
                for question, query in zip(questions, self._queries, strict=True)
            ],
            dtype=np.int64,
        )

    def __len__(self) -> int:
        return len(self.questions)

    def longest(self) -> dict[str, np.ndarray | int | list]:
        """An example that takes as much memory as any: the longest question with the most and longest passages."""
        number, longest = max(self._passages.items(), key=lambda item: len(item[1]))
        most = max(len(_numbers(question)) for question in self.questions)
        return {
            "input_ids": max(self._queries, key=len),
            "passage": number,
            "context_input_ids": [longest] * most,
            "context_passage": [number] * most,
        }

    def __getitem__(self, key: tuple[int, int]) -> dict[str, np.ndarray | int | list]:
        """The question of `key` = (epoch, index), the same in every epoch."""
        _, index = key
        numbers = _numbers(self.questions[index])
        return {
            "input_ids": self._queries[index],
            "passage": numbers[0],
            "context_input_ids": [self._passages[number] for number in numbers],
            "context_passage": numbers,
        }


class ClozePairs(InverseClozeExamples):
    """Sentences of a corpus with the text around them, unmasked: the inverse cloze task alone.

    Arguments are those of `InverseClozeExamples`, without `masker`.
    """

    def __init__(self, corpus, blocks: np.ndarray, *arguments, **options):
        super().__init__(corpus, blocks, _unmasked, *arguments, **options)

    def _example(self, *arguments) -> dict[str, Any]:
        return {name: ids for name, ids in super()._example(*arguments).items() if name.endswith("input_ids")}


class PassageNumbers:
    """Distinct passages, numbered in the order in which they come.

    Attributes:
        passages: those that were given a number, by it.
    """

    def __init__(self):
        self.passages: list[Passage] = []
        self._numbers: dict[tuple[str, str], int] = {}

    def __call__(self, title: str, text: str) -> int:
        """The number of a passage."""
        number = self._numbers.setdefault((title, text), len(self.passages))
        if number == len(self.passages):
            self.passages.append(Passage(str(number), title, text))
        return number


def retrieval_questions(
    examples: Sequence[ReadingExample],
    number_of: PassageNumbers,
    hard_negatives: Mapping[str, Sequence[tuple[str, str]]],
    most_negatives: int,
) -> list[RetrievalQuestion]:
    """SQuAD-style questions, each with its paragraph as the passage that answers it.

    Args:
        examples: the questions. An unanswerable one belongs to the `EMPTY_PASSAGE`, and its paragraph, which looks as
            if it had the answer, is a hard negative.
        number_of: gives passages their numbers.
        hard_negatives: titles and texts of passages by question id, as `read_hard_negatives` returns them. The
            question's own text, whatever its title, is none, and the paragraph of another question is that paragraph,
            whatever its title: for that question it is no negative.
        most_negatives: how many of them to take for a question, the first ones.
    """
    titles = {example.context: example.title for example in examples}
    questions = []
    for example in examples:
        own = number_of(example.title, example.context)
        given = hard_negatives.get(example.id, ())
        others = dict.fromkeys((titles.get(text, title), text) for title, text in given if text != example.context)
        negatives = [number_of(*each) for each in list(others)[:most_negatives]]
        passage, like_it = (EMPTY_PASSAGE, (own,)) if example.is_impossible else (own, ())
        questions.append(RetrievalQuestion(example.question, passage, (*like_it, *negatives)))
    return questions


def read_hard_negatives(file: str | PathLike) -> dict[str, list[tuple[str, str]]]:
    """Hard negatives of questions: JSON lines {"id": question, "negatives": [{"title": ..., "text": ...}, ...]}.

    Args:
        file: also .gz or .xz.

    Returns:
        (title, text) of passages by question id.

    Raises:
        UserError: the file cannot be read, or a line is not like that.
    """
    negatives: dict[str, list[tuple[str, str]]] = {}
    for place, record in read_json_lines(Path(file), "hard negatives of a question"):
        try:
            passages = [(passage.get("title") or "", passage["text"]) for passage in record["negatives"]]
            question = record["id"]
            "".join([question, *chain.from_iterable(passages)])  # is it all text?
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f'{place}: not the hard negatives of a question; write {{"id": "...", "negatives": '
                f'[{{"title": "...", "text": "..."}}]}} ({one_line(error)})'
            ) from error
        negatives[question] = passages
    return negatives


def _unmasked(ids: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, None]:
    """Instead of a `TokenMasker`; a function with a name, which worker processes can be sent."""
    return ids, None


def _numbers(question: RetrievalQuestion) -> list[int]:
    return [question.passage, *question.hard_negatives]
