"""`mixlm export`: models for other libraries."""

import argparse
from pathlib import Path

from ..files import require_free


def add_export_parser(subparsers) -> None:
    """Add `mixlm export sentence-transformers | onnx`."""
    parser = subparsers.add_parser(
        "export",
        help="write a model for sentence-transformers or as ONNX",
        description="Write a model in the form of another library.",
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    sentences = verbs.add_parser(
        "sentence-transformers",
        help="a folder for SentenceTransformer(OUT, trust_remote_code=True)",
        description=(
            "Write a model for retrieval as a folder that sentence-transformers loads without this package, with the "
            "same vectors."
        ),
        epilog="example:\n  mixlm export sentence-transformers outputs/my-retriever outputs/for-sentence-transformers",
    )
    _add_folders(sentences)
    sentences.set_defaults(run=export_sentence_transformers_verb)


def export_sentence_transformers_verb(arguments: argparse.Namespace) -> None:
    """`mixlm export sentence-transformers`."""
    require_free(arguments.out)
    from transformers.utils.logging import disable_progress_bar

    from ..exporting.sentences import export_sentence_transformers

    disable_progress_bar()
    encoding = export_sentence_transformers(arguments.model, arguments.out).encoding
    print(
        f"{arguments.out}: questions of up to {encoding.max_query_length} tokens, passages of up to "
        f"{encoding.max_passage_length}\nSentenceTransformer({str(arguments.out)!r}, trust_remote_code=True) loads it"
    )


def _add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="a model's folder, or its name on the Hub")
    parser.add_argument("out", type=Path, metavar="OUT", help="the new folder")
