"""Answering questions about texts with a model that `run_mrc.py` has trained.

from mixlm.reader import MixLMReader

reader = MixLMReader.from_pretrained("my-reader")
reader.answer("세종대왕은 언제 태어났나?", "세종대왕은 1397년에 태어났다.").text
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForQuestionAnswering, PreTrainedModel, PreTrainedTokenizerFast

import mixlm  # noqa: F401  whose models the Auto classes know from now on

from .data.batching import evaluation_batches
from .data.particles import require_kiwi
from .data.reading import Reading, ReadingWindows, read_answers
from .data.squad import ReadingExample
from .errors import UserError
from .loading import StoredSettings, load_model, require_room, require_vocabulary
from .progress import progress_bar
from .tokenization import load_tokenizer

INPUTS = ("input_ids", "attention_mask", "token_type_ids")

# Of each window, in the order of the windows, [length of the window]: logits of the first and of the last token.
WindowScores = tuple[list[np.ndarray], list[np.ndarray]]


@dataclass(frozen=True)
class Decoding(StoredSettings):
    """How answers come from scores: what a reader needs to know beside the model.

    Args:
        max_seq_length, doc_stride, max_query_length: see `ReadingWindows`.
        n_best_size, max_answer_length: see `best_spans`.
        unanswerable: whether "no answer" is an answer.
        null_threshold: by how much it has to score higher than the best answer.
        korean_particles: drop particles (josa) from the end of answers, see `end_without_particles`.

    Raises:
        UserError: `korean_particles` without Kiwi, which finds them.
    """

    file_name: ClassVar[str] = "reader.json"
    written_by: ClassVar[str] = "run_mrc.py"

    max_seq_length: int = 384
    doc_stride: int = 128
    max_query_length: int = 64
    n_best_size: int = 20
    max_answer_length: int = 30
    unanswerable: bool = False
    null_threshold: float = 0.0
    korean_particles: bool = False

    def __post_init__(self):
        if self.korean_particles:
            require_kiwi()  # now, and not with the first answer

    def windows(
        self, examples: Sequence[ReadingExample], tokenizer: PreTrainedTokenizerFast, training: bool = False
    ) -> ReadingWindows:
        """The windows of questions."""
        return ReadingWindows(
            examples, tokenizer, self.max_seq_length, self.doc_stride, self.max_query_length, training
        )

    def read(self, windows: ReadingWindows, scores: WindowScores) -> Iterator[Reading]:
        """The answer to each question of `windows`."""
        return read_answers(
            windows,
            *scores,
            unanswerable=self.unanswerable,
            n_best_size=self.n_best_size,
            max_answer_length=self.max_answer_length,
            null_threshold=self.null_threshold,
            korean_particles=self.korean_particles,
        )


@torch.no_grad()
def scores_by_window(
    model: Callable[..., Any],
    device: torch.device,
    windows: ReadingWindows,
    rows: int,
    pad_token_id: int,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Number, logits of the first and logits of the last token of each window of a rank.

    Args:
        model: called with a batch, returns `start_logits` and `end_logits`.
        device: where it is.
        windows: of all ranks.
        rows: of a batch.
        pad_token_id: the padding token.
        rank, ranks: this process and how many there are.
    """
    batches = evaluation_batches(windows, rows, pad_token_id, rank, ranks)
    total = -(-len(windows) // (rows * ranks))
    for batch, counts in progress_bar(batches, desc="reading", total=total, leave=False):
        outputs = model(**{name: batch[name].to(device) for name in INPUTS})
        if counts:
            starts, ends = (logits.float().cpu().numpy() for logits in (outputs.start_logits, outputs.end_logits))
            yield from zip(batch["window"].tolist(), starts, ends, strict=True)


def in_order(windows: ReadingWindows, scores: Iterable[tuple[int, np.ndarray, np.ndarray]]) -> WindowScores:
    """What `scores_by_window` has found on all ranks, by the number of the window and without padding."""
    found = {number: logits for number, *logits in scores}
    lengths = windows.lengths.tolist()
    return tuple([found[number][side][:length] for number, length in enumerate(lengths)] for side in (0, 1))


def load_for_reading(name_or_path: str) -> tuple[PreTrainedModel, bool]:
    """A model for question answering, and whether it has a trained head; else the head is new.

    Raises:
        UserError: it cannot be loaded, weights beside the head are missing, or it has no token types, by which the
            question is told from the text.
    """
    model, missing = load_model(AutoModelForQuestionAnswering, name_or_path)
    if other := [name for name in missing if not name.startswith("qa_outputs.")]:
        raise UserError(f"{name_or_path}: lacks {len(other)} weights beside the head, such as {other[0]}")
    if getattr(model.config, "type_vocab_size", 0) < 2:
        raise UserError(f"{name_or_path}: has no token types; machine reading needs two, for question and text")
    return model, not missing


class ReadAnswer(NamedTuple):
    """An answer: `context[start:end] == text`, in characters.

    Args:
        text: "" for "no answer".
        start, end: where in the context it stands; both 0 for "no answer".
        score: its probability among the candidates.
        null_odds: by how much "no answer" scores higher than the best span; None for a reader that always answers.
    """

    text: str
    start: int
    end: int
    score: float
    null_odds: float | None


class MixLMReader:
    """Answers questions about texts of any length.

    Args:
        model: for question answering, of this package or another; it is put into evaluation mode.
        tokenizer: its tokenizer.
        decoding: how answers come from scores.
        batch_size: windows that are read at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        decoding: Decoding | None = None,
        batch_size: int = 32,
    ):
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.decoding = decoding or Decoding()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        device: str | torch.device | None = None,
        batch_size: int = 32,
        decoding: Decoding | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> "MixLMReader":
        """The reader in a folder, or on the Hub.

        Args:
            name_or_path: what `run_mrc.py` has written, or another model for question answering.
            device: None is a GPU where there is one.
            batch_size: windows that are read at once.
            decoding: for a model beside which none is saved.
            tokenizer: None is the model's own.

        Raises:
            UserError: it cannot be loaded, has not been trained to answer questions, or cannot read such windows.
        """
        name = str(name_or_path)
        model, has_head = load_for_reading(name)
        if not has_head:
            raise UserError(f"{name}: is not trained to answer questions; train it with run_mrc.py")
        decoding = Decoding.load(name) or decoding or Decoding()
        require_room(model, name, max_seq_length=decoding.max_seq_length)
        tokenizer = tokenizer or load_tokenizer(name)
        require_vocabulary(model, name, tokenizer)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device), tokenizer, decoding, batch_size)

    def answer(self, question: str, context: str) -> ReadAnswer:
        """The answer to a question about a text."""
        return self.answers([question], [context])[0]

    def answers(self, questions: Sequence[str], contexts: Sequence[str]) -> list[ReadAnswer]:
        """The answers to questions, each about the text of the same number.

        Raises:
            ValueError: there are not as many texts as questions.
        """
        if len(questions) != len(contexts):
            raise ValueError(f"{len(questions)} questions and {len(contexts)} contexts: give one for each")
        examples = [
            ReadingExample(str(number), "", context, question, (), (), is_impossible=True, article=0)
            for number, (question, context) in enumerate(zip(questions, contexts, strict=True))
        ]
        return [
            ReadAnswer(
                reading.answer.text,
                reading.answer.start_char,
                reading.answer.end_char,
                reading.probabilities[reading.candidates.index(reading.answer)],
                reading.null_odds,
            )
            for reading in self.read(examples)
        ]

    def read(self, examples: Sequence[ReadingExample]) -> Iterator[Reading]:
        """All candidates of questions, in their order."""
        windows = self.decoding.windows(examples, self.tokenizer)
        scores = scores_by_window(self.model, self.model.device, windows, self.batch_size, self.tokenizer.pad_token_id)
        return self.decoding.read(windows, in_order(windows, scores))
