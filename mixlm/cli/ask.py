"""`mixlm ask`: answers from an index."""

import argparse
import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, one_line
from .finding import (
    SQUAD_HELP,
    add_index_arguments,
    add_mode_argument,
    mode_of,
    open_indexes,
    open_search,
    require_json_lines,
    require_outside,
)
from .options import question_of, require_positive
from .tables import table

if TYPE_CHECKING:
    from ..data.squad import ReadingExample
    from ..evaluation.open_qa import JudgedAnswer
    from ..open_qa import Candidate, OpenAnswer, OpenQA

_SHOWN_AROUND = 80  # characters of a passage on either side of an answer
_SHOWN_CANDIDATES = 3


def add_ask_parser(subparsers) -> None:
    """Add `mixlm ask`."""
    parser = subparsers.add_parser(
        "ask",
        help="answer questions from an index",
        description=(
            "Find passages for a question, read them, and print the best answer, marked in its passage. Or answer the "
            "questions of a SQuAD-style file without their paragraphs, and print how many answers are right, and "
            "whether the retriever, the reader or the choice among what was read is at fault for the others."
        ),
        epilog=(
            'examples:\n  mixlm ask --index index --reader my-reader "한글은 누가 만들었나?"\n'
            "  mixlm ask --index index --reader my-reader --questions KorQuAD.json --articles 110:140"
        ),
    )
    add_answering_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("question", nargs="?", metavar="QUESTION", help="a question")
    source.add_argument("--questions", type=Path, metavar="FILE", help=f"many, with answers: {SQUAD_HELP}")
    parser.add_argument(
        "--articles",
        metavar="RANGE",
        help="of --questions, those of these alone, such as 110:140; --articles=-30: are the last 30",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="choose by --questions what the retriever's scores weigh beside the reader's, and store it in the index",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="of --questions: the answers, as JSON lines: .jsonl, also .jsonl.gz or .jsonl.xz",
    )
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.set_defaults(run=ask_verb)


def add_answering_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `open_answering` reads."""
    add_index_arguments(parser)
    parser.add_argument("--reader", required=True, metavar="DIR", help="what run_mrc.py has trained")
    add_mode_argument(parser)
    parser.add_argument(
        "--top_k", type=int, default=10, metavar="N", help="passages to read for a question (default: %(default)s)"
    )


def open_answering(arguments: argparse.Namespace) -> "OpenQA":
    """Open the index, the encoder that it needs, and the reader; say where what is tuned for others is not used."""
    require_positive(arguments, "top_k")
    from transformers.utils.logging import disable_progress_bar

    from ..open_qa import OpenQA
    from ..reader import MixLMReader

    disable_progress_bar()
    index = open_indexes(arguments)
    mode = mode_of(index, arguments)
    search = None if mode == "lexical" else open_search(index, arguments)
    answering = OpenQA(index, MixLMReader.from_pretrained(arguments.reader), search, mode, arguments.top_k)
    if answering.unused is not None:
        print(f"note: {answering.unused}; to choose anew: mixlm ask --questions FILE --tune", file=sys.stderr)
    return answering


def ask_verb(arguments: argparse.Namespace) -> None:
    """`mixlm ask`."""
    require_positive(arguments, "top_k")
    for name in ("articles", "tune", "out"):
        if getattr(arguments, name) not in (None, False) and arguments.questions is None:
            raise UserError(f"--{name} is of --questions; leave it out")
    if arguments.tune and len(arguments.index) > 1:
        raise UserError("--tune: the choice is stored in an index; give one")
    if arguments.questions is None:
        question = question_of("the question", arguments.question)
        _print_answer(question, open_answering(arguments).answer(question), arguments.json)
    else:
        if arguments.out is not None:
            require_json_lines(arguments.out, "answers")
            require_outside(arguments.out, "questions", arguments.questions)
        _answer_file(arguments)


def _answer_file(arguments: argparse.Namespace) -> None:
    """Answer the questions of a file, and judge the answers."""
    from ..data.squad import read_squad, require_asked, select_articles
    from ..data.text_files import write_text
    from ..evaluation.open_qa import judge_answer, open_qa_metrics, score_open_answer
    from ..evaluation.reading import ANSWER_SCORES, usual_metric
    from ..open_qa import best_choice

    examples = read_squad(arguments.questions).examples
    if arguments.articles is not None:
        examples = select_articles(examples, arguments.articles)
    require_asked(examples, arguments.questions)
    answering = open_answering(arguments)
    if arguments.tune:
        answering.index.require_tunable()
    passages = list(answering.read([example.question for example in examples]))
    metric = usual_metric([example.context for example in examples])
    score = ANSWER_SCORES[metric]
    if arguments.tune:
        trials = answering.tune(examples, passages, lambda *answer: score_open_answer(*answer, score).f1)
        choice = best_choice(trials)
        answering.store(choice, trials[choice])
    if arguments.tune and not arguments.json:
        rows = [("weight of the retriever", "f1", "answers from a reader score of", "")]
        for each, f1 in trials.items():
            threshold = "" if each.threshold is None else f"{each.threshold:.2f}"
            rows.append((f"{each.weight:g}", f"{f1:.2f}", threshold, "chosen" if each == choice else ""))
        print(table(rows) + "\n")
    answers = [answering.choose(each, answering.choice) for each in passages]
    judged = [
        judge_answer(
            answer.text,
            [(candidate.passage.text, candidate.text) for candidate in each.candidates],
            example.answer_texts,
            score,
        )
        for example, each, answer in zip(examples, passages, answers, strict=True)
    ]
    if arguments.out is not None:
        write_text(
            arguments.out,
            (
                json.dumps(_judged_record(*of_question), ensure_ascii=False) + "\n"
                for of_question in zip(examples, answers, judged, strict=True)
            ),
        )
    metrics = open_qa_metrics(judged, arguments.top_k)
    if arguments.json:
        print(json.dumps({"questions": len(examples), "metric": metric, **asdict(answering.choice), **metrics}))
        return
    answerable = sum(each.is_answerable for each in judged)
    remarks = {
        "exact_match": f"% of {len(examples):,} questions, as {metric} has it",
        "f1": "%",
        "fault_of_retriever": "%: no passage has an answer in its text",
        "fault_of_reader": "%: one has, and the right answer was read in none",
        "fault_of_choice": "%: the right answer was read, or none is right, and another was given",
    }
    of_hits = f"% of {answerable:,} questions that have an answer"
    print(table([(name, f"{value:.2f}", remarks.get(name, of_hits)) for name, value in metrics.items()]))


def _judged_record(example: "ReadingExample", answer: "OpenAnswer", judged: "JudgedAnswer") -> dict[str, Any]:
    """All about a question, as JSON has it."""
    references = {"references": example.answer_texts}
    return {"id": example.id, **answer.record(example.question), **references, **asdict(judged)}


def _print_answer(question: str, answer: "OpenAnswer", as_json: bool) -> None:
    if as_json:
        print(json.dumps(answer.record(question), ensure_ascii=False))
        return
    if not answer.candidates:
        print("no passage is found for this question")
        return
    print(one_line(answer.text) or "(no answer)")
    for place, candidate in enumerate(answer.candidates[:_SHOWN_CANDIDATES]):
        is_held_back = place == 0 and candidate.text and not answer.text
        note = "(what would be the answer)" if is_held_back else ""
        print("\n" + "  ".join(filter(None, (candidate.passage.id, one_line(candidate.passage.title), note))))
        reader = f"{candidate.reader_score:.2f}" if candidate.text else "finds nothing"
        print(f"   reader {reader}, retriever {candidate.retriever_score:.2f}")
        if candidate.passage.text:
            print(f"   {_marked(candidate)}")


def _marked(candidate: "Candidate") -> str:
    """The passage around an answer, which is in reverse video in a terminal and else in brackets; without an answer
    its beginning."""
    text, start, end = candidate.passage.text, candidate.start, candidate.end
    first, last = max(0, start - _SHOWN_AROUND), end + _SHOWN_AROUND
    has_style = sys.stdout.isatty() and not os.environ.get("NO_COLOR")  # as https://no-color.org has it
    before, after = ("\033[7m", "\033[0m") if has_style else ("[", "]")
    if not candidate.text:
        before = after = ""
    parts = (text[first:start], text[start:end], text[end:last])
    left, answer, right = (re.sub(r"\s+", " ", part) for part in parts)
    return f"{'...' if first else ''}{left}{before}{answer}{after}{right}{'...' if last < len(text) else ''}"
