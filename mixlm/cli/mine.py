"""`mixlm mine`: hard negatives for run_ict.py."""

import argparse
import json
from collections import Counter
from pathlib import Path

from ..errors import UserError
from ..progress import progress_bar
from .finding import (
    SQUAD_HELP,
    add_index_arguments,
    add_mode_argument,
    mode_of,
    open_find,
    open_indexes,
    require_json_lines,
    require_outside,
)


def add_mine_parser(subparsers) -> None:
    """Add `mixlm mine`."""
    parser = subparsers.add_parser(
        "mine",
        help="find hard negatives to train a retriever with",
        description=(
            "Search for the questions of a SQuAD-style file and write the passages that are found and do not answer "
            "them, for run_ict.py --hard_negatives. A passage with an answer in its title or text is left out: it may "
            "be right although the question is about another one."
        ),
        epilog=(
            "example:\n  mixlm mine --index index --questions KorQuAD.json --articles 0:110 --out negatives.jsonl\n"
            "  python run_ict.py ... --hard_negatives negatives.jsonl --num_hard_negatives 2"
        ),
    )
    add_index_arguments(parser)
    add_mode_argument(parser)
    parser.add_argument("--questions", type=Path, required=True, metavar="FILE", help=SQUAD_HELP)
    parser.add_argument(
        "--articles",
        metavar="RANGE",
        help="the questions of these alone, such as 0:110; --articles=-30: are the last 30",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".jsonl, also .jsonl.gz or .jsonl.xz")
    parser.add_argument(
        "--per_question", type=int, default=8, metavar="N", help="most negatives of a question (default: %(default)s)"
    )
    parser.add_argument(
        "--depth", type=int, default=50, metavar="N", help="among so many of its hits (default: %(default)s)"
    )
    parser.set_defaults(run=mine_verb)


def mine_verb(arguments: argparse.Namespace) -> None:
    """`mixlm mine`."""
    if not 1 <= arguments.per_question <= arguments.depth:
        raise UserError(
            f"--per_question {arguments.per_question}: must be from 1 to --depth, which is {arguments.depth}"
        )
    require_json_lines(arguments.out, "negatives")
    require_outside(arguments.out, "questions", arguments.questions)
    from ..data.squad import read_squad, select_articles
    from ..data.text_files import write_text
    from ..retrieval.mining import hard_negatives

    examples = read_squad(arguments.questions).examples
    if arguments.articles is not None:
        examples = select_articles(examples, arguments.articles)
    index = open_indexes(arguments)
    found = open_find(index, arguments)([example.question for example in examples], arguments.depth)
    progress = progress_bar(found, desc="mining", total=len(examples), unit=" questions")
    counts: Counter[int] = Counter()

    def lines():
        for example, negatives in hard_negatives(examples, progress, index.passages, arguments.per_question):
            counts[len(negatives)] += 1
            texts = [{"title": passage.title, "text": passage.text} for passage in negatives]
            yield json.dumps({"id": example.id, "negatives": texts}, ensure_ascii=False) + "\n"

    write_text(arguments.out, lines())
    full = counts[arguments.per_question]
    print(
        f"{mode_of(index, arguments)} hard negatives of {len(examples):,} questions: {arguments.out}; {full:,} have "
        f"{arguments.per_question}, {counts[0]:,} none"
    )
