"""Opening an index to find passages in it, as several verbs do."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from ..retrieval.hits import Find
    from ..retrieval.index import Index
    from ..retrieval.search import Search

MODES = ("lexical", "dense", "hybrid")


def add_index_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --index and --model."""
    parser.add_argument("--index", type=Path, required=True, metavar="DIR", help="what mixlm index has built")
    parser.add_argument(
        "--model", metavar="DIR", help="what has encoded the passages (default: where it was when it did)"
    )


def add_mode_argument(parser: argparse.ArgumentParser) -> None:
    """Add --mode."""
    parser.add_argument(
        "--mode",
        choices=MODES,
        help="by common terms, by vectors, or by both (default: hybrid where the index has vectors, else lexical)",
    )


def mode_of(index: "Index", arguments: argparse.Namespace) -> str:
    """How to search: as --mode says, or as well as the index allows."""
    return arguments.mode or ("lexical" if index.dense is None else "hybrid")


def open_find(index: "Index", arguments: argparse.Namespace) -> "Find":
    """What finds passages for questions, by --mode and --model."""
    mode = mode_of(index, arguments)
    return index.find if mode == "lexical" else getattr(open_search(index, arguments), mode)


def open_search(index: "Index", arguments: argparse.Namespace) -> "Search":
    """A search by vectors, with --model or the encoder that the index remembers."""
    if index.dense is None:
        raise UserError(f"{index.folder}: has no vectors to search by; build it with mixlm index --vectors")
    model = arguments.model or index.model
    if arguments.model is None and Path(model).is_absolute() and not Path(model).is_dir():
        raise UserError(f"{model}: the encoder of {index.folder} is no longer there; give its folder as --model")
    from transformers.utils.logging import disable_progress_bar

    from ..encoder import MixLMEncoder
    from ..retrieval.search import Search

    disable_progress_bar()
    return Search(index, MixLMEncoder.from_pretrained(model))


def required_text(name: str, text: str) -> str:
    """A text from the command line, where what is not UTF-8 arrives as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: character {error.start} is no text; write it in UTF-8") from error
    if not text.strip():
        raise UserError(f"{name}: is empty; ask something")
    return text
