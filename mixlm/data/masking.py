"""Choose the tokens that a masked language model has to restore."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from ..heads import IGNORE

DEFAULT_PROBABILITY = 0.15
# Where every span is above the share, as in a row that is one word, only one of up to so many tokens is chosen (at the
# default probability, and in proportion): what is longer is no word but a base64 block.
LONGEST_ABOVE_SHARE = 80

LONGEST_NGRAM = 3
# p(n) is proportional to 1/n (ALBERT, Lan et al. 2019, section 4.1), as cumulative probabilities of n = 1, 2, 3.
NGRAM_CUMULATIVE = np.cumsum(1 / np.arange(1, LONGEST_NGRAM + 1)) / np.sum(1 / np.arange(1, LONGEST_NGRAM + 1))

# Of the chosen tokens 80% become [MASK], 10% a random token, and 10% stay (BERT, Devlin et al. 2018, section 3.1).
MASK_SHARE = 0.8
RANDOM_SHARE = 0.1

Span = tuple[int, int]  # first token, last token exclusive


@dataclass
class Words:
    """The whole words of a sequence. Special tokens belong to none.

    Attributes:
        tokens: the places of all their tokens, [tokens].
        starts: first token of each word, [words].
        ends: last token of each word, exclusive, [words].
        segments: number of special tokens before each word, [words]; words of one segment follow each other directly.
    """

    tokens: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    segments: np.ndarray


def subword_spans(words: Words, random: np.random.Generator) -> Iterator[Span]:
    """Single tokens, in random order."""
    for token in random.permutation(words.tokens).tolist():
        yield token, token + 1


def word_spans(words: Words, random: np.random.Generator) -> Iterator[Span]:
    """Whole words, in random order."""
    order = random.permutation(len(words.starts))
    yield from zip(words.starts[order].tolist(), words.ends[order].tolist(), strict=True)


def ngram_spans(words: Words, random: np.random.Generator) -> Iterator[Span]:
    """One to three whole words, p(n) proportional to 1/n, starting at each word once, in random order.

    A span never goes over a special token: at the end of a segment it has fewer words.
    """
    first = random.permutation(len(words.starts))
    extra_words = np.searchsorted(NGRAM_CUMULATIVE, random.random(len(first)), side="right")
    last_of_segment = np.searchsorted(words.segments, words.segments, side="right") - 1
    last = np.minimum(first + extra_words, last_of_segment[first])
    yield from zip(words.starts[first].tolist(), words.ends[last].tolist(), strict=True)


SPANS_OF_UNIT: dict[str, Callable[[Words, np.random.Generator], Iterator[Span]]] = {
    "subword": subword_spans,
    "word": word_spans,
    "ngram": ngram_spans,
}


class TokenMasker:
    """Masks a share of the tokens of a sequence.

    Args:
        vocab_size: number of ids.
        mask_token_id: id of [MASK].
        special_ids: ids that are never chosen, and never put in place of a token.
        word_start: whether an id starts a word, bool [vocab_size].
        probability: share of the tokens, special ones not counted, that are chosen.
        unit: what is chosen as a whole: "subword" (a token), "word", or "ngram" (one to three words).

    Raises:
        UserError: the probability is not between 0 and 1, or the unit is unknown.
    """

    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int,
        special_ids: Sequence[int],
        word_start: np.ndarray,
        probability: float = DEFAULT_PROBABILITY,
        unit: str = "ngram",
    ):
        if not 0 < probability < 1:
            raise UserError(f"masking probability {probability}: must lie between 0 and 1, for example 0.15")
        if unit not in SPANS_OF_UNIT:
            raise UserError(f'masking unit "{unit}": choose one of {", ".join(SPANS_OF_UNIT)}')
        self.mask_token_id = mask_token_id
        self.probability = probability
        self.spans = SPANS_OF_UNIT[unit]
        # Rounded first: 80 x 0.15 / 0.15 must not become 81.
        self.longest_above_share = math.ceil(round(LONGEST_ABOVE_SHARE * probability / DEFAULT_PROBABILITY, 6))
        self.is_special = np.zeros(vocab_size, dtype=bool)
        self.is_special[list(special_ids)] = True
        self.ordinary_ids = np.flatnonzero(~self.is_special)
        self.word_start = np.asarray(word_start, dtype=bool)

    def __call__(self, ids: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Mask one sequence.

        The share of the tokens is rounded, and at least one, however long the sequence is. Spans are taken in random
        order; one that would go over that number is passed over, so whole words stay whole and the number is only
        ever exceeded where every span is longer: then the shortest is taken, or none (see `LONGEST_ABOVE_SHARE`).

        Args:
            ids: the tokens, [length]; left as they are.
            random: where all draws come from.

        Returns:
            The masked ids and the labels, both int64 [length]; a label is the original id of a chosen token and -100
            elsewhere.
        """
        masked = ids.astype(np.int64)
        labels = np.full(len(ids), IGNORE, dtype=np.int64)
        chosen = np.flatnonzero(self._choose(masked, random))
        originals = labels[chosen] = masked[chosen]

        draws = random.random(len(chosen))
        random_ids = random.choice(self.ordinary_ids, len(chosen))
        masked[chosen] = np.where(
            draws < MASK_SHARE,
            self.mask_token_id,
            np.where(draws < MASK_SHARE + RANDOM_SHARE, random_ids, originals),
        )
        return masked, labels

    def _choose(self, ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Which tokens are chosen, bool [length]."""
        words = self._words(ids)
        chosen = bytearray(len(ids))  # single entries are read and written much faster than those of an array
        remaining = max(1, round(self.probability * len(words.tokens)))
        if len(words.tokens):
            for first, last in self.spans(words, random):
                if last - first <= remaining and not any(chosen[first:last]):
                    chosen[first:last] = b"\x01" * (last - first)
                    remaining -= last - first
                    if not remaining:
                        break
            if not any(chosen):
                first, last = min(self.spans(words, random), key=lambda span: span[1] - span[0])
                if last - first <= self.longest_above_share:
                    chosen[first:last] = b"\x01" * (last - first)
        return np.frombuffer(chosen, dtype=bool)

    def _words(self, ids: np.ndarray) -> Words:
        special = self.is_special[ids]
        after_special = np.concatenate([[True], special[:-1]])
        # A sequence that begins within a word (its sentence was cut) has its first word there.
        borders = np.flatnonzero(special | self.word_start[ids] | after_special)
        ends = np.append(borders[1:], len(ids))
        is_word = ~special[borders]
        return Words(np.flatnonzero(~special), borders[is_word], ends[is_word], np.cumsum(special)[borders[is_word]])
