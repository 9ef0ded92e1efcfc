"""`mixlm search`, `tune` and `evaluate`: finding passages, and how good what is found is."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, one_line
from .finding import (
    add_index_arguments,
    add_mode_argument,
    mode_of,
    open_find,
    open_indexes,
    open_search,
    require_file,
    require_outside,
)
from .index import add_window_argument, fit_window
from .options import question_of, require_positive
from .tables import table

if TYPE_CHECKING:
    from ..retrieval.hits import Found
    from ..retrieval.index import Index

_SHOWN_CHARACTERS = 200  # of a passage, under --query
_QUERIES_HELP = "JSON lines with id and text, or SQuAD-style .json"
_QRELS_HELP = (
    "relevance judgements: query 0 passage grade (TREC), or the three columns of BEIR with their header; or "
    "SQuAD-style .json, whose questions are to find their own paragraph"
)


def add_search_parser(subparsers) -> None:
    """Add `mixlm search`."""
    parser = subparsers.add_parser(
        "search",
        help="find passages in an index",
        description=(
            "Print the passages found for a question, or write those of many questions: as a TREC run, or where the "
            "name ends in .jsonl as JSON, with titles and texts. By common terms, a question without any word finds "
            "none. Of an encoder that was trained with --null_passage it is also told whether any passage answers the "
            "question."
        ),
        epilog=(
            'examples:\n  mixlm search --index index --mode lexical --query "한글은 누가 만들었나?"\n'
            "  mixlm search --index index --queries questions.jsonl --out hits.trec"
        ),
    )
    add_index_arguments(parser)
    questions = parser.add_mutually_exclusive_group(required=True)
    questions.add_argument("--query", metavar="TEXT", help="a question, whose hits are printed")
    questions.add_argument("--queries", type=Path, metavar="FILE", help=f"many: {_QUERIES_HELP}")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="of --queries: lines of query Q0 passage rank score tag; in a .jsonl, an object for each question",
    )
    parser.add_argument("--json", action="store_true", help="of --query: print one object")
    parser.add_argument("--top_k", type=int, default=20, metavar="N", help="most hits of a question (default: 20)")
    add_mode_argument(parser)
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
        epilog=(
            "examples:\n  mixlm tune --index index --queries dev.jsonl --qrels dev.tsv\n"
            "  mixlm tune --index index --queries KorQuAD.json --qrels KorQuAD.json --articles 0:110"
        ),
    )
    add_index_arguments(parser, only_one=True)
    parser.add_argument("--queries", type=Path, required=True, metavar="FILE", help=_QUERIES_HELP)
    parser.add_argument("--qrels", type=Path, required=True, metavar="FILE", help=_QRELS_HELP)
    _add_articles_argument(parser)
    parser.set_defaults(run=tune_verb)


def add_evaluate_parser(subparsers) -> None:
    """Add `mixlm evaluate`."""
    parser = subparsers.add_parser(
        "evaluate",
        help="score the hits of a search against relevance judgements",
        description=(
            "Print accuracy@k (a relevant passage is among the first k), MRR, nDCG, MAP and recall of the hits in a "
            "TREC run, as trec_eval -c computes them. With --compare also how much better they are than those of "
            "another system for the same queries, with a 95% interval (bootstrap) and a p value (randomization test)."
        ),
        epilog=(
            "examples:\n  mixlm evaluate --hits dense.trec --qrels qrels.tsv --compare bm25.trec\n"
            "  mixlm evaluate --hits hits.trec --qrels KorQuAD.json --articles 110:140 --passages KorQuAD.json\n"
            "  mixlm evaluate --hits dense.trec --beir scifact --split test --json"
        ),
    )
    parser.add_argument(
        "--hits", type=Path, required=True, metavar="RUN", help="a TREC run: query Q0 passage rank score tag"
    )
    judgements = parser.add_mutually_exclusive_group(required=True)
    judgements.add_argument("--qrels", type=Path, metavar="FILE", help=_QRELS_HELP)
    judgements.add_argument(
        "--beir",
        type=Path,
        metavar="FOLDER",
        help="a data set in BEIR's layout; as BEIR does, a hit with the query's own id is left out",
    )
    parser.add_argument("--split", metavar="NAME", help="of --beir (default: test)")
    _add_articles_argument(parser)
    parser.add_argument(
        "--passages",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="with SQuAD-style --qrels: what was searched, for answer_accuracy@k (an answer is in one of the first k)",
    )
    add_window_argument(parser)
    parser.add_argument("--compare", type=Path, metavar="RUN", help="the hits of another system")
    parser.add_argument("--json", action="store_true", help="one object; metrics are in percent there too")
    parser.set_defaults(run=evaluate_verb)


def search_verb(arguments: argparse.Namespace) -> None:
    """`mixlm search`."""
    out = arguments.out
    require_positive(arguments, "top_k")
    if (arguments.queries is None) != (out is None):
        raise UserError("--queries and --out belong together; give --query alone to see its hits")
    if arguments.json and out is not None:
        raise UserError("--json is for --query; leave it out, and let the name of --out end in .jsonl")
    if out is not None:
        require_file(out)
        require_outside(out, "queries", arguments.queries)
    from ..data.text_files import plain_suffix, write_text
    from ..evaluation.retrieval_files import read_queries, require_words, write_run
    from ..progress import progress_bar

    if out is not None and plain_suffix(out) == ".json":
        raise UserError(f"--out {out}: as JSON, hits are written a question a line; name it .jsonl")
    queries = (
        {"": question_of("--query", arguments.query)} if arguments.queries is None else read_queries(arguments.queries)
    )
    is_run = out is not None and plain_suffix(out) != ".jsonl"
    if is_run:
        require_words(queries)
    index = open_indexes(arguments)
    mode = mode_of(index, arguments)
    found = open_find(index, arguments)(list(queries.values()), arguments.top_k)
    if out is None:
        _print(index, arguments.query, next(found), arguments.json)
        return
    progress = progress_bar(found, desc="searching", total=len(queries), unit=" questions")
    answered: Counter[bool | None] = Counter()

    def of_queries() -> "Iterator[tuple[str, Found]]":
        for query, of_query in zip(queries, progress, strict=True):
            answered[of_query.has_answer] += 1
            yield query, of_query

    if is_run:
        ids = index.passages.id_of_row
        write_run(out, {query: [(ids(row), score) for row, score in each.hits] for query, each in of_queries()})
    else:
        records = ({"id": query, **_record(index, queries[query], each)} for query, each in of_queries())
        write_text(out, (json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    print(f"{mode} hits of {len(queries):,} questions: {out}")
    if answered[True] or answered[False]:
        print(f"no passage answers {answered[False]:,} of them: the passage without text is nearer")


def tune_verb(arguments: argparse.Namespace) -> None:
    """`mixlm tune`."""
    from ..evaluation.retrieval_files import read_queries
    from ..retrieval.index import open_index
    from ..retrieval.search import best_weight

    queries, (qrels, _) = read_queries(arguments.queries), _judgements(arguments.qrels, arguments.articles)
    if len(arguments.index) > 1:
        raise UserError("--index: the weight is stored in an index; give one")
    index = open_index(arguments.index[0])
    index.require_tunable()
    scores = open_search(index, arguments).tune(queries, qrels)
    weight = best_weight(scores)
    index.store_tuning("hybrid", {"weight": weight, "mrr@10": round(scores[weight], 4)})
    rows = [("weight of dense scores", "mrr@10", "")]
    for each, score in scores.items():
        name = "reciprocal rank fusion" if each is None else f"{each:.1f}"
        rows.append((name, f"{score:.2f}", "chosen" if each == weight else ""))
    print(table(rows))


def evaluate_verb(arguments: argparse.Namespace) -> None:
    """`mixlm evaluate`."""
    if arguments.split is not None and arguments.beir is None:
        raise UserError("--split is for --beir; leave it out")
    fit_window(arguments)
    from ..data.passages import read_passages
    from ..evaluation.retrieval import answer_scores, mean_percent, paired_difference, query_counts, ranking_scores
    from ..evaluation.retrieval_files import beir_files, read_run, without_queries_themselves

    file = arguments.qrels or beir_files(arguments.beir, arguments.split or "test").qrels
    qrels, answers = _judgements(file, arguments.articles)
    if arguments.passages and answers is None:
        raise UserError("--passages are for SQuAD-style .json as --qrels, which has answers to look for; leave it out")
    runs = {"hits": arguments.hits} | ({"compare": arguments.compare} if arguments.compare else {})
    hits = {name: read_run(run) for name, run in runs.items()}
    if arguments.beir:
        hits = {name: without_queries_themselves(of_run) for name, of_run in hits.items()}
    for name, run in runs.items():
        if hits[name].keys().isdisjoint(qrels):
            raise UserError(
                f"{run}: no query is judged in {file} (such as '{next(iter(hits[name]))}' here and "
                f"'{next(iter(qrels))}' there); give files with the same ids"
            )
        found_ids = {passage for of_query in hits[name].values() for passage, _ in of_query}
        judged_ids = {passage for of_query in qrels.values() for passage in of_query}
        if found_ids and judged_ids and found_ids.isdisjoint(judged_ids):
            print(
                f"note: {run}: no passage is judged in {file} (such as '{min(found_ids)}' here and "
                f"'{min(judged_ids)}' there); are the ids the same?",
                file=sys.stderr,
            )
    scores = {name: ranking_scores(of_run, qrels) for name, of_run in hits.items()}
    if arguments.passages:
        found = {passage for of_run in hits.values() for of_query in of_run.values() for passage, _ in of_query}
        passages = read_passages(arguments.passages, window_characters=arguments.window_characters)
        texts = {passage.id: passage.text for passage in passages if passage.id in found}
        for name, of_run in hits.items():
            by_answer = answer_scores(of_run, texts, answers)
            scores[name].update((f"answer_{accuracy}", of_queries) for accuracy, of_queries in by_answer.items())
    means = {name: {metric: mean_percent(each) for metric, each in scores[name].items()} for name in runs}
    counts = {name: query_counts(of_run, qrels) for name, of_run in hits.items()}
    differences = {}
    if arguments.compare:
        others = scores["compare"]
        differences = {metric: paired_difference(each, others[metric]) for metric, each in scores["hits"].items()}

    if arguments.json:
        compared = {"difference": {name: each._asdict() for name, each in differences.items()}} if differences else {}
        print(json.dumps({name: means[name] | counts[name] for name in runs} | compared, ensure_ascii=False))
        return
    heads = ("difference", "from", "to", "p") if differences else ()
    rows = [("", *runs, *heads, "")]
    for metric in means["hits"]:
        cells = [f"{of_run[metric]:.2f}" for of_run in means.values()]
        if differences:
            *points, p_value = differences[metric]
            cells += [*(f"{value:+.2f}" for value in points), f"{p_value:.4f}"]
        rows.append((metric, *cells, "%"))
    remarks = {
        "total": "queries with judgements",
        "missing": "of them without hits, which score 0",
        "without_relevant": "of them without a relevant passage, which score 0",
        "unjudged": "queries with hits and without judgements, left out",
    }
    for name, remark in remarks.items():
        rows.append((name, *(f"{of_run[name]:,}" for of_run in counts.values()), *("" for _ in heads), remark))
    print(table(rows))


def _add_articles_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--articles",
        metavar="RANGE",
        help="of SQuAD-style --qrels: the questions of these alone, such as 110:140; --articles=-30: are the last 30",
    )


def _judgements(file: Path, articles: str | None) -> tuple[Mapping[str, Mapping[str, int]], Mapping | None]:
    """Relevance judgements and, of a SQuAD-style file, answers."""
    from ..evaluation.retrieval_files import is_squad, read_qrels, read_squad_judgements

    if is_squad(file):
        return read_squad_judgements(file, articles)
    if articles is not None:
        raise UserError("--articles are of SQuAD-style .json as --qrels; leave it out")
    return read_qrels(file), None


def _record(index: "Index", question: str, found: "Found") -> dict[str, Any]:
    """What was found, as JSON has it."""
    hits = []
    for rank, (row, score) in enumerate(found.hits, start=1):
        passage = index.passages[row]
        hits.append({"rank": rank, "id": passage.id, "score": score, "title": passage.title, "text": passage.text})
    answered = {"has_answer": found.has_answer, "empty_passage_score": found.empty_score}
    return {"question": question, **(answered if found.has_answer is not None else {}), "hits": hits}


def _print(index: "Index", question: str, found: "Found", as_json: bool) -> None:
    record = _record(index, question, found)
    if as_json:
        print(json.dumps(record, ensure_ascii=False))
        return
    if not found.hits:
        print("no passage is found for this question")
    elif found.has_answer is False:
        print("no passage answers this question; the nearest are:")
    for hit in record["hits"]:
        text = one_line(hit["text"])
        shown = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
        print(f"{hit['rank']}  {hit['score']:.4g}  {hit['id']}  {hit['title']}\n   {shown}")
