"""`mixlm tokenizer`: make one, or see what one does to a corpus."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..files import new_folder, require_free
from .tables import number, table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from ..tokenization import TokenizerReport


def add_tokenizer_parser(subparsers) -> None:
    """Add `mixlm tokenizer train | from-vocab | report`."""
    parser = subparsers.add_parser(
        "tokenizer",
        help="train a WordPiece tokenizer, build one from a vocab.txt, measure one",
        description="Train a WordPiece tokenizer, build one from a vocab.txt, or measure one.",
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    train = verbs.add_parser(
        "train",
        help="train a tokenizer on a corpus",
        description="Train a WordPiece tokenizer on a corpus and save it as a folder that AutoTokenizer loads.",
        epilog="example:\n  mixlm tokenizer train --corpus_path corpus/ --vocab_size 32000 --out my-tokenizer",
    )
    train.add_argument("--corpus_path", required=True, metavar="PATH", help="the text to learn from")
    train.add_argument("--out", required=True, type=Path, metavar="DIR", help="the new folder")
    train.add_argument(
        "--vocab_size", type=int, default=32000, metavar="N", help="number of tokens (default: %(default)s)"
    )
    train.add_argument(
        "--min_frequency",
        type=int,
        default=2,
        metavar="N",
        help="merge two tokens if they stand side by side this often (default: %(default)s)",
    )
    train.add_argument("--lowercase", action="store_true", help="fold case (default: case is kept)")
    _add_max_length(train)
    train.set_defaults(run=train_verb)

    from_vocab = verbs.add_parser(
        "from-vocab",
        help="build a tokenizer from a vocab.txt",
        description="Build a WordPiece tokenizer from a vocab.txt (UTF-8, one token a line).",
        epilog="example:\n  mixlm tokenizer from-vocab vocab.txt --out my-tokenizer",
    )
    from_vocab.add_argument("vocab_file", metavar="vocab.txt", help="one token a line; the line's number is the id")
    from_vocab.add_argument("--out", required=True, type=Path, metavar="DIR", help="the new folder")
    from_vocab.add_argument("--lowercase", action="store_true", help="the vocabulary was made from lowercased text")
    _add_max_length(from_vocab)
    from_vocab.set_defaults(run=from_vocab_verb)

    report = verbs.add_parser(
        "report",
        help="measure how a tokenizer cuts a corpus, and which answers it can hit",
        description="Measure how a tokenizer cuts a corpus, and how many gold answers its tokens can cut out exactly.",
        epilog="example:\n  mixlm tokenizer report --tokenizer DIR --corpus_path corpus/ --squad_file dev.json",
    )
    report.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="a tokenizer's folder, or its name on the Hub"
    )
    report.add_argument("--corpus_path", metavar="PATH", help="text to count")
    report.add_argument("--squad_file", nargs="+", default=[], metavar="FILE", help="reading data, SQuAD-style JSON")
    report.set_defaults(run=report_verb)


def _add_max_length(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max_length",
        type=int,
        default=512,
        metavar="N",
        help="longest input in tokens, for truncation; the model's max_position_embeddings (default: %(default)s)",
    )


def train_verb(arguments: argparse.Namespace) -> None:
    """`mixlm tokenizer train`."""
    _check_new_tokenizer(arguments)
    from ..tokenization import train_tokenizer

    characters: set[str] = set()

    def sentences() -> Iterator[str]:
        for sentence in _read_sentences(arguments.corpus_path):
            characters.update(sentence)
            yield sentence

    tokenizer = train_tokenizer(
        sentences(),
        arguments.vocab_size,
        lowercase=arguments.lowercase,
        min_frequency=arguments.min_frequency,
    )
    _save_tokenizer(tokenizer, arguments)
    if len(tokenizer) < arguments.vocab_size:
        left_out = sum(tokenizer.unk_token in tokenizer.tokenize(character) for character in characters)
        if left_out:
            reason = f"{left_out:,} characters of the corpus did not fit, and no word that has one is learned from"
            remedy = "give a larger --vocab_size"
        else:
            reason = f"the corpus has no more pieces that occur {arguments.min_frequency} times"
            remedy = "give more text"
        print(
            f"These are fewer than the {arguments.vocab_size:,} asked for: {reason}. "
            f"Set the model's vocab_size to {len(tokenizer)}, or {remedy}."
        )


def from_vocab_verb(arguments: argparse.Namespace) -> None:
    """`mixlm tokenizer from-vocab`."""
    _check_new_tokenizer(arguments)
    from ..tokenization import tokenizer_from_vocab

    _save_tokenizer(tokenizer_from_vocab(arguments.vocab_file, lowercase=arguments.lowercase), arguments)


def report_verb(arguments: argparse.Namespace) -> None:
    """`mixlm tokenizer report`."""
    if arguments.corpus_path is None and not arguments.squad_file:
        raise UserError("nothing to measure: give --corpus_path, --squad_file or both")
    from ..tokenization import load_tokenizer, tokenizer_report

    tokenizer = load_tokenizer(arguments.tokenizer)
    sentences = () if arguments.corpus_path is None else _read_sentences(arguments.corpus_path)
    report = tokenizer_report(tokenizer, sentences, arguments.squad_file)
    print(f"{arguments.tokenizer}: {type(tokenizer.backend_tokenizer.model).__name__}, {len(tokenizer):,} tokens")
    if arguments.corpus_path is not None:
        print(f"\n{arguments.corpus_path}")
        print(table(_corpus_rows(report)))
    if arguments.squad_file:
        print(f"\n{', '.join(arguments.squad_file)}")
        print(table(_answer_rows(report)))


def _read_sentences(corpus_path: str) -> Iterator[str]:
    from ..data.corpus import read_documents

    return (sentence for document in read_documents(corpus_path) for sentence in document.sentences)


def _check_new_tokenizer(arguments: argparse.Namespace) -> None:
    """Refuse what would fail at the end of the work before it begins."""
    if arguments.max_length < 3:
        raise UserError(f"--max_length {arguments.max_length}: must be 3 or more, for [CLS], one token and [SEP]")
    require_free(arguments.out)


def _save_tokenizer(tokenizer: "PreTrainedTokenizerFast", arguments: argparse.Namespace) -> None:
    tokenizer.model_max_length = arguments.max_length
    from ..tokenization import save_tokenizer

    with new_folder(arguments.out) as folder:
        save_tokenizer(tokenizer, folder)
    print(f"{len(tokenizer):,} tokens saved in {arguments.out}")
    print(f'Load it with AutoTokenizer.from_pretrained("{arguments.out}").')


def _corpus_rows(report: "TokenizerReport") -> list[tuple[str, str, str]]:
    return [
        ("sentences", f"{report.sentences:,}", ""),
        ("eojeols", f"{report.eojeols:,}", "words between blanks"),
        ("characters", f"{report.characters:,}", "without blanks"),
        ("tokens", f"{report.tokens:,}", "without [CLS] and [SEP]"),
        ("tokens per eojeol", number(report.tokens_per_eojeol, ".3f"), "lower: shorter inputs"),
        ("tokens per character", number(report.tokens_per_character, ".3f"), ""),
        ("unknown tokens", f"{report.unknown_tokens:,}", ""),
        ("unknown rate", number(report.unk_rate, ".4%"), "text the model cannot see"),
    ]


def _answer_rows(report: "TokenizerReport") -> list[tuple[str, str, str]]:
    return [
        ("answers", f"{report.answers:,}", "distinct (question, answer) pairs"),
        ("misplaced answers", f"{report.misplaced_answers:,}", "not at their offset; left out"),
        ("on token borders", f"{report.answers_on_token_borders:,}", ""),
        ("EM ceiling", number(report.em_ceiling, ".2%"), "exact match that a perfect reader would reach"),
    ]
