"""What each choice gains in short and in longer trainings: whether what wins in minutes still wins after them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lines import difference, lines_of
from study import TABLES

LENGTHS = ("3 minutes", "a quarter of an hour", "an hour")


class Comparison(NamedTuple):
    """Two lines of a table: without the choice, and with it; each with the rate that is best for it."""

    table: str
    without: str
    chosen: str


LATE_DECAY = "decay in the last 20%"

# By choice and by the length of the training, where it was tried: each length has tables of its own.
CHOICES: dict[str, dict[str, Comparison]] = {
    "a rate that is kept until the last fifth, not one that falls from the warm-up on": {
        "3 minutes": Comparison("learning_rate", "mixlm-mini", LATE_DECAY),
        "a quarter of an hour": Comparison("decay", "decay from the warm-up on", LATE_DECAY),
    },
    "a rate that falls over the last half, not the last fifth": {
        "3 minutes": Comparison("learning_rate", LATE_DECAY, "decay in the last 50%"),
        "a quarter of an hour": Comparison("decay", LATE_DECAY, "decay in the last 50%"),
        "an hour": Comparison("hour", "MixLM", "decay in the last 50%"),
    },
    "scores of the vocabulary that begin at the tokens' frequencies": {
        "3 minutes": Comparison("initialisation", "mixlm-mini", "decoder begins at token frequencies"),
    },
    "Muon": {
        "3 minutes": Comparison("optimizer", "mixlm-mini", "Muon, 2e-3"),
    },
    "Muon, on top of the token frequencies": {
        "3 minutes": Comparison("embedding_rate", "token frequencies", "Muon, 2e-3"),
        "a quarter of an hour": Comparison("quarter_hour", "MixLM", "MixLM, Muon"),
        "an hour": Comparison("finalists", "MixLM", "MixLM, Muon"),
    },
    "half the feed-forward": {
        "3 minutes": Comparison("kernels", "mixlm-mini", "feed-forward 512"),
        "a quarter of an hour": Comparison("quarter_hour", "MixLM", "MixLM, feed-forward 512"),
        "an hour": Comparison("hour", "MixLM", "feed-forward 512"),
    },
    "half the feed-forward, on top of Muon": {
        "a quarter of an hour": Comparison("quarter_hour", "MixLM, Muon", "MixLM, Muon, feed-forward 512"),
    },
    "three times the rate for embeddings": {
        "3 minutes": Comparison("embedding_rate", "token frequencies", "embeddings 3e-3"),
        "a quarter of an hour": Comparison("quarter_hour", "MixLM", "MixLM, embeddings 3e-3"),
    },
    "masked tokens alone, without sentence order": {
        "3 minutes": Comparison("objective", "mixlm-mini", "masked tokens alone"),
    },
    "MixLM, not ModernBERT": {
        "3 minutes": Comparison("peers_decay", "ModernBERT, 0.001", "mixlm-mini"),
        "an hour": Comparison("finalists", "ModernBERT", "MixLM"),
    },
    "MixLM, not BERT": {
        "3 minutes": Comparison("peers_decay", "BERT pre-LN, 0.001", "mixlm-mini"),
        "a quarter of an hour": Comparison("pretrained", "BERT, SOP", "MixLM, SOP"),
        "an hour": Comparison("finalists", "BERT", "MixLM"),
    },
    "Switch, not BERT": {
        "3 minutes": Comparison("peers_decay", "BERT pre-LN, 0.001", "Switch, 0.0005"),
        "a quarter of an hour": Comparison("pretrained", "BERT, SOP", "Switch, SOP"),
        "an hour": Comparison("finalists", "BERT", "Switch"),
    },
}


def gain_of(comparison: Comparison, results: Sequence[dict[str, Any]]) -> str:
    """By how many nats the loss is lower, over the seeds that both lines have."""
    lines = {line.name: line for line in lines_of(TABLES / f"{comparison.table}.jsonl", results)}
    without, chosen = lines[comparison.without], lines[comparison.chosen]
    return difference(without, chosen, digits=2) or "not made yet"


def rows_of_gains(results: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Cells by the title of their column: what each choice gains in trainings of each length."""
    return [
        {"": choice, **{length: gain_of(tried[length], results) if length in tried else "" for length in LENGTHS}}
        for choice, tried in CHOICES.items()
    ]
