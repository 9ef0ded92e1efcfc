"""`mixlm encode`, `index`, `search` and `tune`: finding passages."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, one_line
from .tables import table

if TYPE_CHECKING:
    from ..retrieval.hits import PassageHit
    from ..retrieval.index import Index
    from ..retrieval.search import Search

MODES = ("lexical", "dense", "hybrid")

_SHOWN_CHARACTERS = 200  # of a passage, under --query


def add_index_parser(subparsers) -> None:
    """Add `mixlm index`."""
    parser = subparsers.add_parser(
        "index",
        help="make passages searchable",
        description=(
            "Build an index for mixlm search out of what mixlm encode has written, or, for search by common terms "
            "alone, out of passages: JSON lines with id, text and title; tab-separated id, text and title; "
            "SQuAD-style .json, whose paragraphs are passages; .dat documents, cut into windows of whole sentences; "
            "a BEIR folder. Also .gz and .xz."
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
            "encodes what is new. Forms of passages: see mixlm index --help."
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
        default=600,
        metavar="N",
        help="longest passage cut out of a .dat document (default: %(default)s)",
    )


def add_search_parser(subparsers) -> None:
    """Add `mixlm search`."""
    parser = subparsers.add_parser(
        "search",
        help="find passages in an index",
        description="Print the passages found for a question, or write those of many questions as a TREC run.",
        epilog=(
            'examples:\n  mixlm search --index index --mode lexical --query "한글은 누가 만들었나?"\n'
            "  mixlm search --index index --model my-retriever --queries questions.jsonl --out hits.trec"
        ),
    )
    parser.add_argument("--index", type=Path, required=True, metavar="DIR", help="what mixlm index has built")
    parser.add_argument("--model", metavar="DIR", help="what has encoded the passages; not for lexical search")
    questions = parser.add_mutually_exclusive_group(required=True)
    questions.add_argument("--query", metavar="TEXT", help="a question, whose hits are printed")
    questions.add_argument(
        "--queries", type=Path, metavar="FILE", help="many: JSON lines with id and text, or SQuAD-style .json"
    )
    parser.add_argument(
        "--out", type=Path, metavar="RUN", help="of --queries: lines of query Q0 passage rank score tag"
    )
    parser.add_argument("--top_k", type=int, default=20, metavar="N", help="most hits of a question (default: 20)")
    parser.add_argument(
        "--mode",
        choices=MODES,
        help="by common terms, by vectors, or by both (default: hybrid where the index has vectors, else lexical)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="encode some passages again first, and compare their vectors"
    )
    parser.set_defaults(run=search_verb)


def add_tune_parser(subparsers) -> None:
    """Add `mixlm tune`."""
    parser = subparsers.add_parser(
        "tune",
        help="choose how hybrid search brings terms and vectors together",
        description=(
            "Search for validation questions, print MRR@10 of reciprocal rank fusion and of each weight of the dense "
            "scores, and store the best weight in the index, which hybrid search uses from then on. Where reciprocal "
            "rank fusion is better than every weight, hybrid search stays with it. An index that is built again has "
            "to be tuned again."
        ),
        epilog="example:\n  mixlm tune --index index --model my-retriever --queries dev.jsonl --qrels dev.tsv",
    )
    parser.add_argument(
        "--index", type=Path, required=True, metavar="DIR", help="what mixlm index --vectors has built"
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="what has encoded the passages")
    parser.add_argument(
        "--queries", type=Path, required=True, metavar="FILE", help="JSON lines with id and text, or SQuAD-style .json"
    )
    parser.add_argument(
        "--qrels", type=Path, required=True, metavar="FILE", help="relevance judgements, of TREC or BEIR"
    )
    parser.set_defaults(run=tune_verb)


def encode_verb(arguments: argparse.Namespace) -> None:
    """`mixlm encode`."""
    for name in ("batch_size", "processes"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: must be 1 or more")
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
    from ..data.passages import read_passages
    from ..retrieval.analysers import BigramAnalyser, MorphemeAnalyser
    from ..retrieval.index import build_index

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
    if "recall@10" in manifest.get("dense", {}):
        print(f"{manifest['dense']['recall@10']:.1%} of the 10 nearest are found (recall@10 of moved passage vectors)")


def search_verb(arguments: argparse.Namespace) -> None:
    """`mixlm search`."""
    if arguments.top_k < 1:
        raise UserError(f"--top_k {arguments.top_k}: must be 1 or more")
    if (arguments.queries is None) != (arguments.out is None):
        raise UserError("--queries and --out belong together; give --query alone to see its hits")
    if arguments.out is not None and not arguments.out.parent.is_dir():
        raise UserError(f"--out {arguments.out}: no such folder; make it first")
    from tqdm import tqdm

    from ..evaluation.retrieval_files import write_run
    from ..retrieval.index import open_index

    queries = {"": arguments.query} if arguments.queries is None else _read_questions(arguments.queries)
    index = open_index(arguments.index)
    mode = arguments.mode or ("lexical" if index.dense is None else "hybrid")
    if arguments.verify and mode == "lexical":
        raise UserError("--verify is for search by vectors; leave it out")
    find = index.lexical.search if mode == "lexical" else getattr(_open_search(index, arguments, mode), mode)
    hits = find(list(queries.values()), arguments.top_k)
    if arguments.queries is None:
        _print_hits(index, next(hits))
        return
    progress = tqdm(hits, desc="searching", total=len(queries), unit=" questions", delay=2)
    run = {
        query: [(index.passages.id_of_row(row), score) for row, score in of_query]
        for query, of_query in zip(queries, progress, strict=True)
    }
    write_run(arguments.out, run)
    print(f"{mode} hits of {len(queries):,} questions: {arguments.out}")


def tune_verb(arguments: argparse.Namespace) -> None:
    """`mixlm tune`."""
    from ..evaluation.retrieval_files import read_qrels
    from ..retrieval.index import open_index
    from ..retrieval.search import best_weight

    queries, qrels = _read_questions(arguments.queries), read_qrels(arguments.qrels)
    index = open_index(arguments.index)
    scores = _open_search(index, arguments, "hybrid").tune(queries, qrels)
    weight = best_weight(scores)
    index.store_tuning({"weight": weight, "mrr@10": round(scores[weight], 4)})
    rows = [("weight of dense scores", "mrr@10", "")]
    for each, score in scores.items():
        name = "reciprocal rank fusion" if each is None else f"{each:.1f}"
        rows.append((name, f"{score:.2f}", "chosen" if each == weight else ""))
    print(table(rows))


def _open_search(index: "Index", arguments: argparse.Namespace, mode: str) -> "Search":
    """A search by vectors, with `--model` and, if asked for, `--verify`."""
    if arguments.model is None:
        raise UserError(f"{mode} search needs --model, what has encoded the passages; or search with --mode lexical")
    from transformers.utils.logging import disable_progress_bar

    from ..encoder import MixLMEncoder
    from ..retrieval.search import Search

    disable_progress_bar()
    search = Search(index, MixLMEncoder.from_pretrained(arguments.model))
    if getattr(arguments, "verify", False):
        print(f"{search.verify()} passages were encoded again: their vectors are those of the index")
    return search


def _print_hits(index: "Index", hits: "list[PassageHit]") -> None:
    if not hits:
        print("no passage is found for this question")
    for rank, (row, score) in enumerate(hits, start=1):
        passage = index.passages[row]
        text = one_line(passage.text)
        shown = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
        print(f"{rank}  {score:.4g}  {passage.id}  {passage.title}\n   {shown}")


def _read_questions(file: Path) -> dict[str, str]:
    """Questions by id."""
    from ..data.squad import plain_suffix, read_squad
    from ..evaluation.retrieval_files import read_queries

    if plain_suffix(file) != ".json":
        return read_queries(file)
    return {example.id: example.question for example in read_squad(file, to_learn_from=False).examples}
