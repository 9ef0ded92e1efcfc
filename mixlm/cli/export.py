"""`mixlm export`: models for other libraries."""

import argparse
from pathlib import Path

from ..files import require_free
from .tables import significant, table


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

    onnx = verbs.add_parser(
        "onnx",
        help="a folder for onnxruntime",
        description=(
            "Write a reader, or an encoder of questions and passages, as ONNX graphs with its tokenizer and "
            "configuration, and print how far and how often they differ from the model."
        ),
        epilog="example:\n  mixlm export onnx outputs/my-retriever outputs/my-retriever-onnx --int8",
    )
    _add_folders(onnx)
    onnx.add_argument("--int8", action="store_true", help="also write graphs in 8 bits: smaller, faster, less exact")
    onnx.add_argument(
        "--squad_file",
        type=Path,
        metavar="FILE",
        help="questions to compare on, as SQuAD has them (default: the bundled Korean ones)",
    )
    onnx.set_defaults(run=export_onnx_verb)


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


def export_onnx_verb(arguments: argparse.Namespace) -> None:
    """`mixlm export onnx`."""
    require_free(arguments.out)
    from transformers.utils.logging import disable_progress_bar

    from ..exporting.onnx_folders import SAMPLE, export_onnx

    disable_progress_bar()
    report = export_onnx(
        arguments.model, arguments.out, int8=arguments.int8, squad_file=arguments.squad_file or SAMPLE
    )
    print(
        f"{arguments.out}: compared with {arguments.model} on the {report['questions']:,} questions of "
        f"{report['squad_file']}, threads: {report['threads']}"
    )
    kinds = [kind for kind in report if kind.endswith(".onnx")]
    rows = [("", *kinds, "")]
    for name in report[kinds[0]]:
        rows.append((name, *(_formatted(name, report[kind][name]) for kind in kinds), ""))
    print(table(rows))


def _formatted(name: str, value: float) -> str:
    if name.startswith("same"):
        return f"{value:.1%}"
    if name.startswith("speed"):
        return f"x{value:.2f}"
    return significant(value)


def _add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="a model's folder, or its name on the Hub")
    parser.add_argument("out", type=Path, metavar="OUT", help="the new folder")
