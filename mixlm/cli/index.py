"""`mixlm encode` and `index`: making passages searchable."""

import argparse
from pathlib import Path

from ..errors import UserError
from .options import require_positive


def add_index_parser(subparsers) -> None:
    """Add `mixlm index`."""
    parser = subparsers.add_parser(
        "index",
        help="make passages searchable",
        description=(
            "Build an index for mixlm search out of what mixlm encode has written, or, for search by common terms "
            "alone, out of passages: JSON lines with id, text and title; tab-separated id, text and title; "
            "SQuAD-style .json, whose paragraphs are passages; .dat documents, cut into windows of whole sentences; "
            "a BEIR folder, or one of .dat, of .jsonl or of .tsv files. Also .gz and .xz."
        ),
        epilog=(
            "examples:\n  mixlm index --vectors vectors --out index\n"
            "  mixlm index --passages passages.jsonl --lexical_only --out index"
        ),
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--vectors", type=Path, metavar="DIR", help="what mixlm encode has written, with its passages")
    source.add_argument("--passages", type=Path, nargs="+", metavar="PATH", help="files or folders")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the index; an older one is replaced")
    parser.add_argument(
        "--lexical_only", action="store_true", help="of --passages: search by common terms alone (BM25)"
    )
    kinds = parser.add_mutually_exclusive_group()
    for kind, text in (
        ("exact", "of --vectors: look at every vector (default)"),
        ("hnsw", "of --vectors: a graph of neighbours; fast, slow to build"),
        ("ivfpq", "of --vectors: lists of short codes; fast with little memory, for 10,000 passages or more"),
    ):
        kinds.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, help=text)
    parser.add_argument(
        "--morphemes",
        action="store_true",
        help="terms are morphemes that Kiwi finds (slower), and not pairs of neighbouring syllables",
    )
    add_window_argument(parser)
    parser.set_defaults(run=index_verb)


def add_encode_parser(subparsers) -> None:
    """Add `mixlm encode`."""
    parser = subparsers.add_parser(
        "encode",
        help="turn passages into vectors",
        description=(
            "Write the vectors of passages, in shards. Killed and started again, it goes on; over changed passages it "
            "encodes what is new, and deletes vectors of passages that are not given any more. Forms of passages: see "
            "mixlm index --help."
        ),
        epilog="example:\n  mixlm encode --model my-retriever --passages passages.jsonl --out vectors",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="what run_ict.py has written, or a Hub name")
    parser.add_argument("--passages", type=Path, nargs="+", required=True, metavar="PATH", help="files or folders")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the vectors")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=64, metavar="N", help="texts at once (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that encode (default: %(default)s)")
    add_window_argument(parser)
    parser.set_defaults(run=encode_verb)


def add_window_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--window_characters`, of the verbs that read passages."""
    parser.add_argument(
        "--window_characters",
        type=int,
        metavar="N",
        help="longest passage cut out of a .dat document (default: 600)",
    )


def fit_window(arguments: argparse.Namespace) -> None:
    """Set `--window_characters` where it is not given.

    Raises:
        UserError: it is given, and cuts nothing: there are no `--passages`, or only files of other forms than .dat.
    """
    from ..data.passages import WINDOW_CHARACTERS
    from ..data.text_files import plain_suffix

    if arguments.window_characters is None:
        arguments.window_characters = WINDOW_CHARACTERS
    elif not arguments.passages:
        raise UserError("--window_characters is of --passages; leave it out")
    elif all(path.is_file() and plain_suffix(path) != ".dat" for path in arguments.passages):
        raise UserError("--window_characters cuts .dat documents, and --passages has none; leave it out")


def encode_verb(arguments: argparse.Namespace) -> None:
    """`mixlm encode`."""
    require_positive(arguments, "batch_size", "processes")
    fit_window(arguments)
    from transformers.utils.logging import disable_progress_bar

    from ..data.passages import read_passages
    from ..retrieval.vectors import encode_passages

    disable_progress_bar()
    count = encode_passages(
        read_passages(arguments.passages, window_characters=arguments.window_characters),
        arguments.model,
        arguments.out,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        processes=arguments.processes,
    )
    print(f"{arguments.out}: the vectors of {count:,} passages")


def index_verb(arguments: argparse.Namespace) -> None:
    """`mixlm index`."""
    if arguments.passages and not arguments.lexical_only:
        raise UserError(
            "--passages are for --lexical_only; for vectors, run mixlm encode first and give its --vectors"
        )
    if arguments.passages and arguments.kind:
        raise UserError(f"--{arguments.kind} is for --vectors; leave it out")
    if arguments.vectors and arguments.lexical_only:
        raise UserError("--lexical_only is for --passages; leave it out, and search with --mode lexical")
    fit_window(arguments)
    from ..data.passages import read_passages
    from ..retrieval.analysers import BigramAnalyser, MorphemeAnalyser
    from ..retrieval.index import build_index, is_tuned

    was_tuned = is_tuned(arguments.out)
    analyser = MorphemeAnalyser() if arguments.morphemes else BigramAnalyser()
    if arguments.passages:
        vectors, kind = None, ""
        passages = read_passages(arguments.passages, window_characters=arguments.window_characters)
    else:
        from ..retrieval.vectors import StoredVectors

        vectors, kind = StoredVectors(arguments.vectors), arguments.kind or "exact"
        passages = vectors.passages()
    manifest = build_index(passages, arguments.out, analyser, vectors, kind)
    print(f"{manifest['passages']['count']:,} passages: {arguments.out}")
    if "change" in manifest.get("dense", {}):
        change = manifest["dense"]["change"]
        added, kept, gone = (change[name] for name in ("added", "kept", "gone"))
        gone = f"{gone:,}, whose passages are gone, are passed over"
        print(f"{added:,} vectors are added to the {kept:,} that stay; {gone}")
    if "recall@10" in manifest.get("dense", {}):
        print(f"{manifest['dense']['recall@10']:.1%} of the 10 nearest are found (recall@10 of moved passage vectors)")
    if was_tuned:
        print("the weights that the index before was tuned to are gone; mixlm tune makes them anew")
