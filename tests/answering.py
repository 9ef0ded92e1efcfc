"""Readers for the tests of answering from a collection: one whose answers are known, and a tiny real one."""

import re
from pathlib import Path

import torch

import mixlm
from mixlm.data.reading import Reading, Span
from mixlm.reader import Decoding
from mixlm.tokenization import train_tokenizer

NO_SPAN = Span("", 0, 0, 0.0, 0.0, 0.0)


class StubReader:
    """Takes the first number in a text for the answer to any question; its score is the number of its digits.

    Args:
        null_score: of "no answer"; None is a reader that always answers.
        null_threshold: see `Decoding`.
        seed: of its weights, by which an index knows it.

    Attributes:
        read_texts: question and text of all that was read.
    """

    def __init__(self, null_score: float | None = None, null_threshold: float = 0.0, seed: int = 0):
        torch.manual_seed(seed)
        self.model = torch.nn.Linear(2, 2)
        self.null_score = null_score
        self.decoding = Decoding(unanswerable=null_score is not None, null_threshold=null_threshold)
        self.read_texts: list[tuple[str, str]] = []

    def read(self, examples):
        for example in examples:
            self.read_texts.append((example.question, example.context))
            number = re.search(r"\d+", example.context)
            spans = [Span(number[0], *number.span(), float(len(number[0])), 0.0, 0.0)] if number else []
            best = spans[0] if spans else NO_SPAN
            if self.null_score is None:
                yield Reading(best, [best], [1.0], None)
            else:
                null = NO_SPAN._replace(score=self.null_score)
                candidates = sorted([*spans, null], key=lambda span: -span.score)
                yield Reading(candidates[0], candidates, [1.0] * len(candidates), self.null_score - best.score)


def save_reader(folder: Path, texts: list[str]) -> str:
    """A reader with random weights, whose windows are shorter than most texts."""
    tokenizer = train_tokenizer(texts * 3, 200, show_progress=False)
    config = mixlm.MixLMConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, n_experts=2, num_heads=2, kernel_size=5,
        ff_dim=64, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    mixlm.MixLMForQuestionAnswering(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Decoding(max_seq_length=32, doc_stride=8, max_query_length=8, max_answer_length=5).save(folder)
    return str(folder)
