"""What the verbs that find passages in an index have in common: their options, and how it is opened."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from ..retrieval.hits import Find
    from ..retrieval.index import Index
    from ..retrieval.search import Search
    from ..retrieval.shards import ShardedIndex

MODES = ("lexical", "dense", "hybrid")
SQUAD_HELP = "SQuAD-style .json, or .jsonl with SQuAD's columns"


def add_index_arguments(parser: argparse.ArgumentParser, only_one: bool = False) -> None:
    """Add --index, --model and --verify.

    Args:
        parser: of a verb.
        only_one: the verb takes a single index, and its help says so.
    """
    several = "one" if only_one else "given several times, all are searched as one, by vectors alone"
    parser.add_argument(
        "--index",
        type=Path,
        action="append",
        required=True,
        metavar="DIR",
        help=f"what mixlm index has built; {several}",
    )
    parser.add_argument(
        "--model", metavar="DIR", help="what has encoded the passages (default: where it was when it did)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="encode some passages again first, and compare their vectors"
    )


def add_mode_argument(parser: argparse.ArgumentParser) -> None:
    """Add --mode."""
    parser.add_argument(
        "--mode",
        choices=MODES,
        help="by common terms, by vectors, or by both (default: hybrid where the index has vectors, else lexical)",
    )


def open_indexes(arguments: argparse.Namespace) -> "Index | ShardedIndex":
    """Open --index: one, or several as one."""
    if len(arguments.index) == 1:
        from ..retrieval.index import open_index

        return open_index(arguments.index[0])
    if arguments.mode not in (None, "dense"):
        raise UserError(
            f"--mode {arguments.mode}: several indexes are searched by vectors alone, because what a term is worth "
            "depends on all passages; leave it out"
        )
    from ..retrieval.shards import open_shards

    return open_shards(arguments.index)


def mode_of(index: "Index | ShardedIndex", arguments: argparse.Namespace) -> str:
    """How to search: as --mode says, or as well as the index allows.

    Raises:
        UserError: there is a --model or --verify, and nothing for it to do.
    """
    if len(arguments.index) > 1:
        return "dense"
    mode = arguments.mode or ("lexical" if index.dense is None else "hybrid")
    if mode == "lexical" and arguments.model is not None:
        raise UserError(f"--model {arguments.model}: is for search by vectors, and this is lexical; leave it out")
    if mode == "lexical" and arguments.verify:
        raise UserError("--verify: is for search by vectors, and this is lexical; leave it out")
    return mode


def open_find(index: "Index | ShardedIndex", arguments: argparse.Namespace) -> "Find":
    """What finds passages for questions, by --mode and --model."""
    mode = mode_of(index, arguments)
    return index.find if mode == "lexical" else getattr(open_search(index, arguments), mode)


def open_search(index: "Index | ShardedIndex", arguments: argparse.Namespace) -> "Search":
    """A search by vectors, with --model or the encoder that the index remembers; with --verify, once that is right."""
    if index.dense is None:
        raise UserError(f"{index.folder}: has no vectors to search by; build it with mixlm index --vectors")
    model = arguments.model or index.model
    if arguments.model is None and Path(model).is_absolute() and not Path(model).is_dir():
        raise UserError(f"{model}: the encoder of {index.folder} is no longer there; give its folder as --model")
    from transformers.utils.logging import disable_progress_bar

    from ..encoder import MixLMEncoder
    from ..retrieval.search import Search

    disable_progress_bar()
    search = Search(index, MixLMEncoder.from_pretrained(model))
    if arguments.verify:  # not where answers go, which may be JSON
        message = f"{search.verify()} passages were encoded again: their vectors are those of the index"
        print(message, file=sys.stderr)
    return search


def require_file(out: Path) -> None:
    """Raise UserError unless --out can be a file: before the work, which may take hours, and not after."""
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: no such folder; make it first")
    if out.exists() and not out.is_file():
        raise UserError(f"--out {out}: is no file; use another name")


def require_json_lines(out: Path, content: str) -> None:
    """Raise UserError unless --out can be a file of JSON lines, as `require_file` does.

    Args:
        out: the file.
        content: what it will hold of each question, for messages.
    """
    from ..data.text_files import plain_suffix

    if plain_suffix(out) != ".jsonl":
        raise UserError(f"--out {out}: {content} are written a question a line; name it .jsonl")
    require_file(out)


def require_outside(out: Path, name: str, questions: Path) -> None:
    """Raise UserError where --out is the file, or lies in the folder, that is given as --NAME."""
    if questions.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"--out {out}: is what --{name} reads, or lies in it; use another name")
