"""`mixlm data`: what a corpus is made of."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..errors import UserError
from .tables import number, table

if TYPE_CHECKING:
    from ..data.corpus import Document
    from ..data.statistics import CorpusStatistics, Overlap


def add_data_parser(subparsers) -> None:
    """Add `mixlm data stats`."""
    parser = subparsers.add_parser("data", help="measure a corpus", description="Measure a corpus.")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    stats = verbs.add_parser(
        "stats",
        help="size, lengths, duplicates, and what of an evaluation is in it",
        description=(
            "Print how large a corpus is, how long its documents and sentences are, what is in it twice, and which "
            "texts and questions of an evaluation are in it: what was seen in pretraining is no test."
        ),
        epilog="example:\n  mixlm data stats --corpus_path corpus/ --tokenizer DIR --evaluation_file dev.json",
    )
    source = stats.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus_path", metavar="PATH", help="folder or file of .dat, .dat.xz, .dat.gz")
    source.add_argument("--dataset_name", metavar="NAME", help="a `datasets` name or a local dataset")
    stats.add_argument("--dataset_config_name", metavar="NAME", help="configuration of the dataset")
    stats.add_argument("--text_column", default="text", metavar="NAME", help="of the dataset (default: text)")
    stats.add_argument("--streaming", action="store_true", help="read the dataset without copying it to the disk")
    stats.add_argument("--tokenizer", metavar="DIR", help="count its tokens too: a folder, or a name on the Hub")
    stats.add_argument(
        "--evaluation_file", nargs="+", default=[], metavar="FILE", help="SQuAD-style files to look for in the corpus"
    )
    stats.add_argument("--json", action="store_true", help="print all of it as one JSON object")
    stats.set_defaults(run=stats_verb)


def stats_verb(arguments: argparse.Namespace) -> None:
    """`mixlm data stats`."""
    if arguments.dataset_name is None and (arguments.streaming or arguments.dataset_config_name):
        raise UserError("--streaming and --dataset_config_name are for --dataset_name; leave them out")
    from ..data.statistics import corpus_statistics

    backend = unknown_id = None
    if arguments.tokenizer is not None:
        from ..tokenization import load_tokenizer

        tokenizer = load_tokenizer(arguments.tokenizer)
        backend, unknown_id = tokenizer.backend_tokenizer, tokenizer.unk_token_id
    statistics = corpus_statistics(_documents(arguments), backend, unknown_id, arguments.evaluation_file)
    if arguments.json:
        print(json.dumps(asdict(statistics), indent=2, ensure_ascii=False))
        return
    print(arguments.corpus_path or arguments.dataset_name)
    print(table(_size_rows(statistics, arguments.tokenizer)))
    print("\nlengths")
    print(table(_length_rows(statistics)))
    print("\nduplicates")
    print(table(_duplicate_rows(statistics)))
    for overlap in statistics.overlaps:
        print(f"\n{overlap.file}")
        print(table(_overlap_rows(overlap)))
        for known in overlap.most_known:
            print(f"    {known.share:6.1%} of the text of question {known.question}: {known.place}")


def _documents(arguments: argparse.Namespace) -> "Iterator[Document]":
    from ..data.corpus import read_dataset_documents, read_documents

    if arguments.corpus_path is not None:
        return read_documents(arguments.corpus_path)
    return read_dataset_documents(
        arguments.dataset_name, arguments.text_column, arguments.dataset_config_name, arguments.streaming
    )


def _size_rows(statistics: "CorpusStatistics", tokenizer: str | None) -> list[tuple[str, str, str]]:
    rows = [
        ("documents", f"{statistics.documents:,}", ""),
        ("sentences", f"{statistics.sentences:,}", ""),
        ("words", f"{statistics.words:,}", "without punctuation"),
        ("characters", f"{statistics.characters:,}", "without blanks"),
    ]
    if statistics.tokens is not None:
        rate = _share(statistics.unknown_tokens, statistics.tokens)
        rows += [
            ("tokens", f"{statistics.tokens:,}", f"of {tokenizer}, without [CLS] and [SEP]"),
            ("unknown tokens", f"{statistics.unknown_tokens:,}", rate),
        ]
    return rows


def _length_rows(statistics: "CorpusStatistics") -> list[tuple[str, ...]]:
    rows = [("", "mean", "median", "90%", "99%", "longest", "")]
    for name, each in statistics.lengths.items():
        rows.append(
            (name, f"{each.mean:,.1f}", *(f"{n:,}" for n in (each.median, each.p90, each.p99, each.longest)), "")
        )
    return rows


def _duplicate_rows(statistics: "CorpusStatistics") -> list[tuple[str, str, str, str]]:
    found, documents = statistics.duplicates, statistics.documents
    return [
        ("documents", f"{found.documents:,}", _share(found.documents, documents), "stand earlier too"),
        (
            "similar documents",
            f"{found.similar_documents:,}",
            _share(found.similar_documents, documents),
            "the same but for digits, case, blanks and punctuation",
        ),
        ("sentences", f"{found.sentences:,}", _share(found.sentences, statistics.sentences), "stand earlier too"),
    ]


def _overlap_rows(overlap: "Overlap") -> list[tuple[str, str, str, str]]:
    from ..data.statistics import KNOWN_SHARE, WORDS_OF_A_RUN

    def row(name: str, count: int, whole: int, remark: str) -> tuple[str, str, str, str]:
        return name, f"{count:,}", _share(count, whole), remark

    return [
        row("texts", overlap.texts, overlap.texts, "contexts, each once"),
        row("short texts", overlap.short_texts, overlap.texts, f"below {WORDS_OF_A_RUN} words: not looked for"),
        row(
            "touched texts", overlap.touched_texts, overlap.texts, f"{WORDS_OF_A_RUN} words in a row are in the corpus"
        ),
        row("known texts", overlap.known_texts, overlap.texts, f"{KNOWN_SHARE:.0%} of such runs are in the corpus"),
        row("questions", overlap.questions, overlap.questions, ""),
        row("about known texts", overlap.questions_about_known_texts, overlap.questions, ""),
        row("known questions", overlap.known_questions, overlap.questions, "are a sentence of the corpus"),
    ]


def _share(count: int, whole: int) -> str:
    return number(count / whole if whole else float("nan"), ".2%")
