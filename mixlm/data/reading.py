"""Machine reading: questions as overlapping windows over their contexts, and answers out of the scores of windows.

Windows, the rule for which of them a token belongs to, and the files of predictions are those of BERT's run_squad.py.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from ..errors import UserError
from ..progress import progress_bar
from .cutting import text_backend
from .hangul import compose_hangul
from .particles import end_without_particles
from .squad import ReadingExample, SkippedAnswer

SPECIAL_TOKENS_PER_WINDOW = 3  # [CLS] question [SEP] context [SEP]
NO_ANSWER_POSITION = 0  # of [CLS]
NO_TOKENS = (-1, -1)  # first and last token of an answer that is in no window

ENCODE_BATCH = 1000


@dataclass(frozen=True)
class Window:
    """What decoding needs to know of a window.

    Attributes:
        number: of the window in its dataset.
        context_position: where in the input the context begins, in tokens.
        offsets: first character and last, exclusive, of each token of this part of the context, [tokens, 2].
        has_max_context: whether no other window shows the token with more text on both sides, bool [tokens]. Every
            token of a context has it in exactly one window.
    """

    number: int
    context_position: int
    offsets: np.ndarray
    has_max_context: np.ndarray


class Span(NamedTuple):
    """A candidate: `context[start_char:end_char] == text`; its score is the sum of its two logits."""

    text: str
    start_char: int
    end_char: int
    score: float
    start_logit: float
    end_logit: float


class Reading(NamedTuple):
    """What was found about a question.

    Args:
        answer: a span of the context, or the empty one for "no answer".
        candidates: from the best to the worst; the empty span is one of them where there may be no answer.
        probabilities: of the candidates, by a softmax over their scores.
        null_odds: by how much "no answer" scores higher than the best span; None where there always is an answer.
    """

    answer: Span
    candidates: list[Span]
    probabilities: list[float]
    null_odds: float | None


@dataclass(frozen=True)
class Predictions:
    """What the official scripts write into the files of these names.

    Attributes:
        predictions: the answer to each question id; "" for none.
        nbest_predictions: for each id the best candidates, as text, probability, start_logit and end_logit.
        null_odds: for each id, by how much "no answer" scores higher than the best answer. Empty unless questions can
            be unanswerable.
    """

    predictions: dict[str, str]
    nbest_predictions: dict[str, list[dict[str, str | float]]]
    null_odds: dict[str, float]


class ReadingWindows(Dataset):
    """Windows [CLS] question [SEP] part of the context [SEP] of every question.

    An item has `input_ids` and `token_type_ids` ([length]; 1 for the context and its [SEP]), `start_positions` and
    `end_positions` (first and last token of the first answer; both 0, [CLS], where the window does not hold all of
    it), and `window` (its own index: the order of batches is another one).

    The tokenizer is given questions in NFC, and contexts whose Hangul is syllables where it was letters (NFD); offsets
    are places in the contexts as they are.

    Args:
        examples: the questions.
        tokenizer: any fast tokenizer with [CLS] and [SEP]; its truncation and padding are not used.
        max_seq_length: most tokens of a window.
        doc_stride: tokens from the beginning of one window to that of the next.
        max_query_length: of a longer question the first tokens are used.
        training: leave out the questions that cannot be learned from: answerable, but without an answer in the tokens.

    Attributes:
        examples: the questions that have windows.
        example_of_window: index in `examples`, [windows].
        lengths: tokens of each window, [windows].
        cut_questions: how many questions were longer than `max_query_length`.
        skipped: questions with answers of which no token is left: the tokenizer drops all of their characters.

    Raises:
        UserError: the lengths leave no room for a context, or a window would begin after the one before has ended.
    """

    def __init__(
        self,
        examples: Sequence[ReadingExample],
        tokenizer: PreTrainedTokenizerFast,
        max_seq_length: int = 384,
        doc_stride: int = 128,
        max_query_length: int = 64,
        training: bool = False,
    ):
        _check_lengths(max_seq_length, doc_stride, max_query_length)
        self.cls, self.sep = np.array([tokenizer.cls_token_id]), np.array([tokenizer.sep_token_id])
        backend = text_backend(tokenizer.backend_tokenizer)
        contexts = _encode(backend, [example.context for example in examples], "contexts")
        self.examples: list[ReadingExample] = []
        self.skipped: list[SkippedAnswer] = []
        answer_tokens: list[tuple[int, int]] = []
        for example in examples:
            _, offsets = contexts[example.context]
            tokens = _answer_tokens(example, offsets)
            if tokens is None and example.answers:
                reason = f"the tokenizer drops every character of the answer {example.answers[0].text!r}"
                self.skipped.append(SkippedAnswer(example.id, reason))
            if tokens is not None or example.is_impossible or not training:
                self.examples.append(example)
                answer_tokens.append(tokens or NO_TOKENS)
        self._answer_tokens = np.array(answer_tokens, dtype=np.int64).reshape(-1, 2)
        self._contexts = [contexts[example.context] for example in self.examples]

        # What pretraining reads is in NFC too. Of contexts only the Hangul is composed, because offsets are needed.
        asked = [unicodedata.normalize("NFC", example.question) for example in self.examples]
        questions = _encode(backend, asked, "questions")
        whole_questions = [questions[question][0] for question in asked]
        self._questions = [ids[:max_query_length] for ids in whole_questions]
        self.cut_questions = sum(len(ids) > max_query_length for ids in whole_questions)

        question_lengths = np.array([len(ids) for ids in self._questions], dtype=np.int64)
        context_lengths = np.array([len(ids) for ids, _ in self._contexts], dtype=np.int64)
        room = max_seq_length - SPECIAL_TOKENS_PER_WINDOW - question_lengths
        windows = 1 + np.maximum(0, -((room - context_lengths) // doc_stride))  # what does not fit, rounded up
        self._first_window = np.concatenate([[0], np.cumsum(windows)])
        self.example_of_window = of = np.repeat(np.arange(len(self.examples)), windows)
        self._first_token = (np.arange(len(of)) - self._first_window[of]) * doc_stride
        self._last_token = np.minimum(self._first_token + room[of], context_lengths[of])  # exclusive
        self.lengths = SPECIAL_TOKENS_PER_WINDOW + question_lengths[of] + self._last_token - self._first_token

    def __len__(self) -> int:
        return len(self.lengths)

    def longest(self) -> dict[str, np.ndarray | int]:
        """A window as long as any."""
        return self[0, int(np.argmax(self.lengths))]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, np.ndarray | int]:
        """The window of `key` = (epoch, index), the same in every epoch."""
        _, index = key
        example = self.example_of_window[index]
        question = self._questions[example]
        ids, _ = self._contexts[example]
        first, last = self._first_token[index], self._last_token[index]
        input_ids = np.concatenate([self.cls, question, self.sep, ids[first:last], self.sep])
        context_position = len(question) + 2
        token_type_ids = np.zeros(len(input_ids), dtype=np.int64)
        token_type_ids[context_position:] = 1
        start, end = self._answer_tokens[example]
        if first <= start and end < last:
            start_position, end_position = start - first + context_position, end - first + context_position
        else:
            start_position = end_position = NO_ANSWER_POSITION
        return {
            "input_ids": input_ids,
            "token_type_ids": token_type_ids,
            "start_positions": int(start_position),
            "end_positions": int(end_position),
            "window": int(index),
        }

    def windows_of(self, example: int) -> list[Window]:
        """The windows of the question at this index of `examples`, in the order of its context."""
        numbers = range(self._first_window[example], self._first_window[example + 1])
        _, offsets = self._contexts[example]
        borders = [(self._first_token[number], self._last_token[number]) for number in numbers]
        best_window = _windows_of_most_context(borders, len(offsets))
        return [
            Window(
                number=number,
                context_position=len(self._questions[example]) + 2,
                offsets=offsets[first:last],
                has_max_context=best_window[first:last] == place,
            )
            for place, (number, (first, last)) in enumerate(zip(numbers, borders, strict=True))
        ]


def best_spans(
    context: str,
    windows: Sequence[Window],
    start_logits: Sequence[np.ndarray],
    end_logits: Sequence[np.ndarray],
    n_best_size: int = 20,
    max_answer_length: int = 30,
    korean_particles: bool = False,
) -> list[Span]:
    """The best answers to a question over all of its windows.

    All spans compete whose first token has its maximal context in the window that shows it, so that no span is scored
    twice. Blanks around a text are left out, and of equal texts the best is kept.

    Args:
        context: the whole context.
        windows: of the question, as `ReadingWindows.windows_of` has them.
        start_logits: of each window, [at least the length of the window]; padding behind it is not looked at.
        end_logits: likewise.
        n_best_size: most spans.
        max_answer_length: most tokens of a span.
        korean_particles: drop those at the end of a text, see `end_without_particles`.

    Returns:
        At most `n_best_size` spans of different texts, from the best to the worst; of equals the first in the context.
        None only where no token of the context has text.

    Raises:
        UserError: `n_best_size` or `max_answer_length` is below 1, or a logit of the context is no finite number.
    """
    if n_best_size < 1 or max_answer_length < 1:
        raise UserError(
            f"n_best_size {n_best_size} and max_answer_length {max_answer_length}: both must be 1 or more; "
            "20 and 30 are usual"
        )
    longest = max((len(window.offsets) for window in windows), default=0)
    max_answer_length = min(max_answer_length, max(1, longest))  # none is longer, and a table is as wide
    # Row t, column l of the table: the span from token t on that is l tokens longer than one. Windows are stacked.
    tables, starts, ends, offsets = [], [], [], []
    for window, window_starts, window_ends in zip(windows, start_logits, end_logits, strict=True):
        part = slice(window.context_position, window.context_position + len(window.offsets))
        own_starts = np.asarray(window_starts[part], dtype=np.float64)
        own_ends = np.asarray(window_ends[part], dtype=np.float64)
        if not (np.isfinite(own_starts).all() and np.isfinite(own_ends).all()):
            raise UserError(
                f"the scores of window {window.number} are not all finite numbers: the training of this model has "
                "diverged, or 16 bits are too few for it; use an earlier checkpoint or 32 bits"
            )
        starts.append(own_starts)
        ends.append(own_ends)
        offsets.append(window.offsets)
        if len(window.offsets):
            allowed_starts = np.where(window.has_max_context, own_starts, -np.inf)
            nothing_ends_there = np.full(max_answer_length - 1, -np.inf)  # behind this window
            following_ends = np.lib.stride_tricks.sliding_window_view(
                np.concatenate([own_ends, nothing_ends_there]), max_answer_length
            )
            tables.append((allowed_starts[:, None] + following_ends).ravel())
    if not tables:
        return []
    scores = np.concatenate(tables)
    start_of, end_of, offset_of = np.concatenate(starts), np.concatenate(ends), np.concatenate(offsets)

    # Equal texts drop out, so that more spans than asked for are looked at; hardly ever all of them.
    for count in sorted({min(4 * n_best_size, len(scores)), len(scores)}):
        spans: dict[str, Span] = {}
        for candidate in _best_first(scores, count):
            first, more_tokens = divmod(candidate, max_answer_length)
            last = first + more_tokens
            start_char, end_char = int(offset_of[first, 0]), int(offset_of[last, 1])
            text = context[start_char:end_char]
            start_char += len(text) - len(text.lstrip())  # the tokens of some tokenizers begin with the blank
            text = text.strip()
            if text and korean_particles:
                # Here and not from the answer alone: 학교 and 학교에서 become one candidate, the answer is one of the
                # candidates, and SQuAD 2.0's scores, which look at them, are those of the same texts.
                text = text[: end_without_particles(context, start_char, start_char + len(text)) - start_char]
            if text and text not in spans:
                spans[text] = Span(
                    text,
                    start_char,
                    start_char + len(text),
                    float(scores[candidate]),
                    float(start_of[first]),
                    float(end_of[last]),
                )
                if len(spans) == n_best_size:
                    return list(spans.values())
    return list(spans.values())


def null_span(start_logits: Sequence[np.ndarray], end_logits: Sequence[np.ndarray]) -> Span:
    """The candidate "no answer", scored by the window that believes in it least: its logits of [CLS] sum to the least.

    Args:
        start_logits: of each window of a question, [at least the length of the window].
        end_logits: likewise.
    """
    pairs = [
        (float(starts[NO_ANSWER_POSITION]), float(ends[NO_ANSWER_POSITION]))
        for starts, ends in zip(start_logits, end_logits, strict=True)
    ]
    start_logit, end_logit = min(pairs, key=sum)
    return Span("", 0, 0, start_logit + end_logit, start_logit, end_logit)


def read_answers(
    windows: ReadingWindows,
    start_logits: Sequence[np.ndarray],
    end_logits: Sequence[np.ndarray],
    *,
    unanswerable: bool = False,
    n_best_size: int = 20,
    max_answer_length: int = 30,
    null_threshold: float = 0.0,
    korean_particles: bool = False,
) -> Iterator[Reading]:
    """The answer to each question, in the order of `windows.examples`.

    Args:
        windows: the questions.
        start_logits: of each window, in the order of `windows`, [at least the length of the window].
        end_logits: likewise.
        unanswerable: whether "no answer" is an answer, as in SQuAD 2.0.
        n_best_size: most candidates of a question; "no answer" and the best span are always among them.
        max_answer_length: most tokens of an answer.
        null_threshold: "no answer" is the answer where it scores higher than the best span by more than this.
        korean_particles: see `best_spans`.

    Raises:
        UserError: as `best_spans`.
    """
    examples = progress_bar(windows.examples, desc="choosing answers", unit=" questions", leave=False)
    for index, example in enumerate(examples):
        of_example = windows.windows_of(index)
        own = slice(of_example[0].number, of_example[-1].number + 1)
        starts, ends = start_logits[own], end_logits[own]
        spans = best_spans(example.context, of_example, starts, ends, n_best_size, max_answer_length, korean_particles)
        # There is no span in a context of which the tokenizer drops every character.
        candidates = spans or [Span("", 0, 0, 0.0, 0.0, 0.0)]
        answer, null_odds = candidates[0], None
        if unanswerable:
            null = null_span(starts, ends)
            null_odds = null.score - answer.score
            if null_odds > null_threshold or not spans:
                answer = null
            ranked = sorted([*spans, null], key=lambda span: -span.score)
            # The best answer and "no answer" are candidates however few there are: a threshold decides between them.
            always = [null, *spans[:1]]
            candidates = [span for span in ranked if span in ranked[:n_best_size] or span in always]
        weights = np.exp(np.array([span.score for span in candidates]) - max(span.score for span in candidates))
        yield Reading(answer, candidates, (weights / weights.sum()).tolist(), null_odds)


def predictions_of(windows: ReadingWindows, readings: Iterable[Reading]) -> Predictions:
    """What `read_answers` has found about the questions of `windows`, in the form of the official scripts."""
    result = Predictions({}, {}, {})
    for example, reading in zip(windows.examples, readings, strict=True):
        result.predictions[example.id] = reading.answer.text
        if reading.null_odds is not None:
            result.null_odds[example.id] = reading.null_odds
        result.nbest_predictions[example.id] = [
            {
                "text": span.text,
                "probability": probability,
                "start_logit": span.start_logit,
                "end_logit": span.end_logit,
            }
            for span, probability in zip(reading.candidates, reading.probabilities, strict=True)
        ]
    return result


def _check_lengths(max_seq_length: int, doc_stride: int, max_query_length: int) -> None:
    if max_query_length < 1 or doc_stride < 1:
        raise UserError(
            f"max_query_length {max_query_length} and doc_stride {doc_stride}: both must be 1 or more; "
            "64 and 128 are usual"
        )
    room = max_seq_length - SPECIAL_TOKENS_PER_WINDOW - max_query_length
    if room < 2:
        raise UserError(
            f"max_seq_length {max_seq_length} with max_query_length {max_query_length} leaves no room for a context; "
            "use a longer max_seq_length or a shorter max_query_length"
        )
    if doc_stride >= room:
        raise UserError(
            f"doc_stride {doc_stride}: with max_seq_length {max_seq_length} and max_query_length {max_query_length} a "
            f"window has room for {room} tokens of the context; use a doc_stride below that, such as {room // 2}"
        )


def _encode(backend: Tokenizer, texts: Sequence[str], unit: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Ids [tokens] and offsets [tokens, 2] of each text, without special tokens. Each text is encoded once.

    Ids are those of the text with its Hangul composed, offsets are places in the text as it is.
    """
    distinct = list(dict.fromkeys(texts))
    encoded = {}
    with progress_bar(desc=f"tokenizing {unit}", total=len(distinct), unit=f" {unit}", leave=False) as progress:
        for first in range(0, len(distinct), ENCODE_BATCH):
            batch = distinct[first : first + ENCODE_BATCH]
            composed, borders = zip(*map(compose_hangul, batch), strict=True)
            encodings = backend.encode_batch(composed, add_special_tokens=False)
            for text, of_text, encoding in zip(batch, borders, encodings, strict=True):
                ids = np.array(encoding.ids, dtype=np.int64)
                encoded[text] = ids, of_text[np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)]
            progress.update(len(batch))
    return encoded


def _answer_tokens(example: ReadingExample, offsets: np.ndarray) -> tuple[int, int] | None:
    """First and last token of the first answer that has tokens; a token that is only partly in it is one of them."""
    for answer in example.answers:
        tokens = np.flatnonzero((offsets[:, 0] < answer.end) & (offsets[:, 1] > answer.start))
        if len(tokens):
            return int(tokens[0]), int(tokens[-1])
    return None


def _best_first(scores: np.ndarray, count: int) -> list[int]:
    """Where the `count` highest scores are, from the highest on; of equals the first, and none that is -inf."""
    threshold = np.partition(scores, -count)[-count]
    above = np.flatnonzero(scores > threshold)
    at_threshold = np.flatnonzero(scores == threshold)[: count - len(above)] if threshold > -np.inf else []
    best = np.concatenate([above[np.argsort(-scores[above], kind="stable")], at_threshold])
    return best.astype(np.int64).tolist()


def _windows_of_most_context(borders: Sequence[tuple[int, int]], tokens: int) -> np.ndarray:
    """For each token of a context, which of the windows (first, last exclusive) shows it best, [tokens].

    That is the one with the most text on the side of the token where there is less, to which a hundredth of its
    own length is added; of equals the first.
    """
    most = np.full(tokens, -1.0)
    best = np.zeros(tokens, dtype=np.int64)
    for window, (first, last) in enumerate(borders):
        before = np.arange(last - first)
        context = np.minimum(before, before[::-1]) + 0.01 * (last - first)
        better = np.flatnonzero(context > most[first:last]) + first
        most[better] = context[better - first]
        best[better] = window
    return best
