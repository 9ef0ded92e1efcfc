"""`mixlm evaluate`: how good rankings of passages are."""

import argparse
import json
from pathlib import Path

from ..errors import UserError
from .tables import table


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
            "  mixlm evaluate --hits dense.trec --beir scifact --split test --json"
        ),
    )
    parser.add_argument(
        "--hits", type=Path, required=True, metavar="RUN", help="a TREC run: query Q0 passage rank score tag"
    )
    judgements = parser.add_mutually_exclusive_group(required=True)
    judgements.add_argument(
        "--qrels",
        type=Path,
        metavar="FILE",
        help="relevance judgements: query 0 passage grade (TREC), or the three columns of BEIR with their header",
    )
    judgements.add_argument("--beir", type=Path, metavar="FOLDER", help="a data set in BEIR's layout")
    parser.add_argument("--split", metavar="NAME", help="of --beir (default: test)")
    parser.add_argument("--compare", type=Path, metavar="RUN", help="the hits of another system")
    parser.add_argument("--json", action="store_true", help="one object; metrics are in percent there too")
    parser.set_defaults(run=evaluate_verb)


def evaluate_verb(arguments: argparse.Namespace) -> None:
    """`mixlm evaluate`."""
    if arguments.split is not None and arguments.beir is None:
        raise UserError("--split is for --beir; leave it out")
    from ..evaluation.retrieval import METRICS, paired_difference, retrieval_metrics, retrieval_scores
    from ..evaluation.retrieval_files import beir_files, read_qrels, read_run

    file = arguments.qrels or beir_files(arguments.beir, arguments.split or "test").qrels
    qrels = read_qrels(file)
    runs = {"hits": arguments.hits} | ({"compare": arguments.compare} if arguments.compare else {})
    hits = {name: read_run(run) for name, run in runs.items()}
    for name, run in runs.items():
        if hits[name].keys().isdisjoint(qrels):
            raise UserError(
                f"{run}: no query is judged in {file} (such as '{next(iter(hits[name]))}' here and "
                f"'{next(iter(qrels))}' there); give files with the same ids"
            )
    found = {name: retrieval_metrics(of_run, qrels) for name, of_run in hits.items()}
    differences = {}
    if arguments.compare:
        scores, others = (retrieval_scores(hits[name], qrels) for name in runs)
        differences = {name: paired_difference(scores[name], others[name]) for name in METRICS}

    if arguments.json:
        compared = {"difference": {name: each._asdict() for name, each in differences.items()}} if differences else {}
        print(json.dumps(found | compared, ensure_ascii=False))
        return
    heads = ("difference", "from", "to", "p") if differences else ()
    rows = [("", *runs, *heads, "")]
    for name in METRICS:
        cells = [f"{of_run[name]:.2f}" for of_run in found.values()]
        if differences:
            *points, p_value = differences[name]
            cells += [*(f"{value:+.2f}" for value in points), f"{p_value:.4f}"]
        rows.append((name, *cells, "%"))
    remarks = {
        "total": "queries with judgements",
        "missing": "of them without hits, which score 0",
        "without_relevant": "of them without a relevant passage, which score 0",
        "unjudged": "queries with hits and without judgements, left out",
    }
    for name, remark in remarks.items():
        rows.append((name, *(f"{of_run[name]:,}" for of_run in found.values()), *("" for _ in heads), remark))
    print(table(rows))
