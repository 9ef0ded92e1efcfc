"""Pretraining examples: blocks of consecutive sentences as inputs and labels of the two objectives.

An example is a pure function of (seed, epoch, index): neither the worker nor the rank that makes it changes it.
"""

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..heads import IGNORE
from .masking import TokenMasker
from .store import TokenizedCorpus

ORIGINAL_ORDER, SWAPPED_ORDER = 0, 1


class _BlockExamples(Dataset):
    """What the two objectives share: the blocks, the special tokens and the source of randomness.

    Args:
        corpus: where the sentences are.
        blocks: rows (document, first sentence, last sentence exclusive, tokens), some or all of `corpus.blocks(...)`.
        masker: chooses the tokens to restore.
        cls_token_id: id of [CLS].
        sep_token_id: id of [SEP].
        max_seq_length: most tokens of an example; blocks hold at most `max_seq_length - special_tokens`.
        seed: of all randomness.
    """

    special_tokens: int  # that the longest example adds to its block

    def __init__(
        self,
        corpus: TokenizedCorpus,
        blocks: np.ndarray,
        masker: TokenMasker,
        cls_token_id: int,
        sep_token_id: int,
        max_seq_length: int,
        seed: int,
    ):
        longest = int(blocks[:, 3].max(initial=0))
        if longest + self.special_tokens > max_seq_length:
            raise ValueError(
                f"a block of {longest} tokens and {self.special_tokens} special tokens do not fit max_seq_length "
                f"{max_seq_length}; make the blocks with corpus.blocks({max_seq_length - self.special_tokens})"
            )
        self.corpus = corpus
        self.blocks = blocks
        self.masker = masker
        self.cls = np.array([cls_token_id])
        self.sep = np.array([sep_token_id])
        self.seed = seed

    def __len__(self) -> int:
        return len(self.blocks)

    def longest(self) -> dict[str, np.ndarray | int]:
        """An example as long as any."""
        return self[0, int(np.argmax(self.lengths))]

    def limit(self, most: int) -> None:
        """Keep at most `most` examples, evenly over the documents."""
        if len(self.blocks) > most:
            self.blocks = self.blocks[np.linspace(0, len(self.blocks) - 1, most).round().astype(int)]

    def _random(self, epoch: int, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, epoch, index))

    def _sentences(self, index: int) -> list[np.ndarray]:
        document, first, last = self.blocks[index, :3].tolist()
        return self.corpus.sentences(document, first, last)


class SentenceOrderExamples(_BlockExamples):
    """Masked language modelling and sentence order prediction (ALBERT, Lan et al. 2019, section 3.1).

    A block is split at a random sentence border into A and B: [CLS] A [SEP] B [SEP]. Half of the time the two are
    swapped, and the model tells which is the case. A block of one sentence, [CLS] A [SEP], is for masked language
    modelling alone.

    An example has `input_ids`, `token_type_ids`, `labels` (all [length]) and `sentence_order_label`: 0 for the
    original order, 1 for swapped segments, -100 for a block of one sentence.
    """

    special_tokens = 3

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, [examples]."""
        has_two_segments = self.blocks[:, 2] - self.blocks[:, 1] > 1
        return self.blocks[:, 3] + 2 + has_two_segments

    def __getitem__(self, key: tuple[int, int]) -> dict[str, np.ndarray | int]:
        """The example of `key` = (epoch, index)."""
        epoch, index = key
        random = self._random(epoch, index)
        sentences = self._sentences(index)
        if len(sentences) == 1:
            segments = [sentences]
            order = IGNORE
        else:
            border = int(random.integers(1, len(sentences)))
            segments = [sentences[:border], sentences[border:]]
            order = ORIGINAL_ORDER
            if random.random() < 0.5:
                segments.reverse()
                order = SWAPPED_ORDER

        ids = np.concatenate([self.cls, *(piece for segment in segments for piece in (*segment, self.sep))])
        input_ids, labels = self.masker(ids, random)
        token_type_ids = np.zeros(len(ids), dtype=np.int64)
        first_segment = 2 + sum(map(len, segments[0]))
        token_type_ids[first_segment:] = 1
        return {
            "input_ids": input_ids,
            "token_type_ids": token_type_ids,
            "labels": labels,
            "sentence_order_label": order,
        }


class InverseClozeExamples(_BlockExamples):
    """Masked language modelling and the inverse cloze task (Lee et al. 2019, section 4).

    A random sentence of a block is the query, the block without it the context that belongs to it. Sometimes the query
    stays in the context, so that exact matches are learned too. Blocks of one sentence have no context: they are left
    out.

    An example has `input_ids` and `labels` of [CLS] query [SEP] (both [query length]), `context_input_ids` and
    `context_labels` of [CLS] context [SEP] (both [context length]).

    Args:
        remove_query_probability: how often the query is taken out of its context.
    """

    special_tokens = 2

    def __init__(
        self,
        corpus: TokenizedCorpus,
        blocks: np.ndarray,
        masker: TokenMasker,
        cls_token_id: int,
        sep_token_id: int,
        max_seq_length: int,
        seed: int,
        remove_query_probability: float = 0.9,
    ):
        has_context = blocks[:, 2] - blocks[:, 1] > 1
        super().__init__(corpus, blocks[has_context], masker, cls_token_id, sep_token_id, max_seq_length, seed)
        self.remove_query_probability = remove_query_probability

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the context with its query, the most that an example can have, [examples]."""
        return self.blocks[:, 3] + self.special_tokens

    def longest(self) -> dict[str, np.ndarray | int]:
        """As long as a batch is ever padded to: its longest query and its longest context can be of two examples."""
        block = self._sentences(int(np.argmax(self.blocks[:, 3])))
        tokens = np.concatenate(block)
        query = tokens[: min(self.corpus.longest_sentence_length, len(tokens) - 1)]  # it is not alone in its block
        return self._example(query, block, self._random(0, 0))

    def __getitem__(self, key: tuple[int, int]) -> dict[str, np.ndarray]:
        """The example of `key` = (epoch, index)."""
        epoch, index = key
        random = self._random(epoch, index)
        sentences = self._sentences(index)
        place = int(random.integers(len(sentences)))
        query = sentences[place]
        if random.random() < self.remove_query_probability:
            del sentences[place]
        return self._example(query, sentences, random)

    def _example(self, query: np.ndarray, context: list[np.ndarray], random: np.random.Generator) -> dict[str, Any]:
        input_ids, labels = self.masker(np.concatenate([self.cls, query, self.sep]), random)
        context_input_ids, context_labels = self.masker(np.concatenate([self.cls, *context, self.sep]), random)
        return {
            "input_ids": input_ids,
            "labels": labels,
            "context_input_ids": context_input_ids,
            "context_labels": context_labels,
        }
