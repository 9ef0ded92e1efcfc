"""`mixlm <verb>`: everything that is not training.

A verb is a function `add_..._parser(subparsers)` that ends with `set_defaults(run=function)`. The function imports
what it needs when it runs.
"""

import argparse
import difflib
import json
import math
import re
import sys
import unicodedata
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError, exits_on_user_error, is_out_of_memory
from .files import new_folder, require_free

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from .planning import Plan
    from .profiling import MemoryUse, OperatorTime, Profile
    from .tokenization import TokenizerReport


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and that knows which option was meant."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        # Looked at before parsing: argparse would first complain that the misspelled option is missing.
        args = sys.argv[1:] if args is None else list(args)
        options = takewhile(lambda argument: argument != "--", args)
        if self._subparsers is not None:
            options = takewhile(lambda argument: argument.startswith("-"), options)
        for option in options:
            name = option.partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                self.error(f"unknown option {name}{_did_you_mean(name, self._option_string_actions)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {close[0]}?" if close else ""


@exits_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Run one verb.

    Args:
        argv: the arguments after `mixlm`; those of the process if None.

    Raises:
        SystemExit: with 2 after an error of the user's, with 0 after `--help`.
    """
    parser = _Parser(prog="mixlm", description="Encoders for retrieval and machine reading: everything but training.")
    subparsers = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    add_tokenizer_parser(subparsers)
    add_fill_mask_parser(subparsers)
    add_read_parser(subparsers)
    add_report_parser(subparsers)
    add_profile_parser(subparsers)
    add_plan_parser(subparsers)
    add_verify_engines_parser(subparsers)
    add_convert_parser(subparsers)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)


def add_tokenizer_parser(subparsers) -> None:
    """Add `mixlm tokenizer train | from-vocab | report`."""
    parser = subparsers.add_parser(
        "tokenizer",
        help="train a WordPiece tokenizer, build one from a vocab.txt, measure one",
        description="Train a WordPiece tokenizer, build one from a vocab.txt, or measure one.",
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    train = verbs.add_parser(
        "train",
        help="train a tokenizer on a corpus",
        description="Train a WordPiece tokenizer on a corpus and save it as a folder that AutoTokenizer loads.",
        epilog="example:\n  mixlm tokenizer train --corpus_path corpus/ --vocab_size 32000 --out my-tokenizer",
    )
    train.add_argument("--corpus_path", required=True, metavar="PATH", help="the text to learn from")
    train.add_argument("--out", required=True, type=Path, metavar="DIR", help="the new folder")
    train.add_argument(
        "--vocab_size", type=int, default=32000, metavar="N", help="number of tokens (default: %(default)s)"
    )
    train.add_argument(
        "--min_frequency",
        type=int,
        default=2,
        metavar="N",
        help="merge two tokens if they stand side by side this often (default: %(default)s)",
    )
    train.add_argument("--lowercase", action="store_true", help="fold case (default: case is kept)")
    _add_max_length(train)
    train.set_defaults(run=train_verb)

    from_vocab = verbs.add_parser(
        "from-vocab",
        help="build a tokenizer from a vocab.txt",
        description="Build a WordPiece tokenizer from a vocab.txt (UTF-8, one token a line).",
        epilog="example:\n  mixlm tokenizer from-vocab vocab.txt --out my-tokenizer",
    )
    from_vocab.add_argument("vocab_file", metavar="vocab.txt", help="one token a line; the line's number is the id")
    from_vocab.add_argument("--out", required=True, type=Path, metavar="DIR", help="the new folder")
    from_vocab.add_argument("--lowercase", action="store_true", help="the vocabulary was made from lowercased text")
    _add_max_length(from_vocab)
    from_vocab.set_defaults(run=from_vocab_verb)

    report = verbs.add_parser(
        "report",
        help="measure how a tokenizer cuts a corpus, and which answers it can hit",
        description="Measure how a tokenizer cuts a corpus, and how many gold answers its tokens can cut out exactly.",
        epilog="example:\n  mixlm tokenizer report --tokenizer DIR --corpus_path corpus/ --squad_file dev.json",
    )
    report.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="a tokenizer's folder, or its name on the Hub"
    )
    report.add_argument("--corpus_path", metavar="PATH", help="text to count")
    report.add_argument("--squad_file", nargs="+", default=[], metavar="FILE", help="reading data, SQuAD-style JSON")
    report.set_defaults(run=report_verb)


def add_fill_mask_parser(subparsers) -> None:
    """Add `mixlm fill-mask`."""
    parser = subparsers.add_parser(
        "fill-mask",
        help="let a pretrained model fill [MASK] in a sentence",
        description="Print what a pretrained model expects in place of [MASK].",
        epilog='example:\n  mixlm fill-mask --model outputs/my-model "대한민국의 수도는 [MASK]이다."',
    )
    parser.add_argument("text", help="a sentence with at least one [MASK]")
    parser.add_argument("--model", required=True, metavar="DIR", help="a model's folder, or its name on the Hub")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="answers per mask (default: %(default)s)")
    parser.set_defaults(run=fill_mask_verb)


def add_read_parser(subparsers) -> None:
    """Add `mixlm read`."""
    parser = subparsers.add_parser(
        "read",
        help="answer questions about texts with a model trained by run_mrc.py",
        description=(
            "Answer a question about a text, or the questions of a SQuAD-style file or of JSON lines with "
            '"question" and "context", one answer a line.'
        ),
        epilog=(
            'examples:\n  mixlm read --model my-reader --question "언제 났나?" --context "그는 1397년에 태어났다."\n'
            "  mixlm read --model my-reader --file questions.jsonl --json > answers.jsonl"
        ),
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a reader's folder, or its name on the Hub")
    parser.add_argument("--question", metavar="TEXT", help="a question")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--context", metavar="TEXT", help="the text that it is about")
    source.add_argument("--context_file", type=Path, metavar="FILE", help="a file with that text")
    source.add_argument("--file", type=Path, metavar="FILE", help="many questions: JSON lines, or SQuAD-style .json")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="windows at once (default: 32)")
    parser.add_argument(
        "--json", action="store_true", help="JSON lines: id, text, start, end (characters), score, null_odds"
    )
    parser.set_defaults(run=read_verb)


def add_report_parser(subparsers) -> None:
    """Add `mixlm report`."""
    parser = subparsers.add_parser(
        "report",
        help="draw the curves of one or several training runs",
        description="Draw the curves of training runs into a PNG and print their last numbers.",
        epilog="example:\n  mixlm report outputs/my-model",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="output_dir/model_name of a run")
    parser.add_argument(
        "--out", type=Path, metavar="PNG", help="the picture (default: curves.png in the first run's folder)"
    )
    parser.set_defaults(run=report_runs_verb)


def add_profile_parser(subparsers) -> None:
    """Add `mixlm profile`."""
    parser = subparsers.add_parser(
        "profile",
        help="show where a training step spends time, arithmetic and memory",
        description=(
            "Measure a training step on random ids: forward with MLM and the second objective, backward, AdamW. "
            "Prints time by phase, arithmetic against what the machine can do, the slowest operators, memory by kind."
        ),
        epilog="example:\n  mixlm profile --preset mixlm-base --shape 8x128",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--preset", metavar="NAME", help="a preset, with random weights")
    source.add_argument("--model", metavar="DIR", help="a model's folder, or its name on the Hub")
    parser.add_argument(
        "--shape", default="8x128", metavar="ROWSxTOKENS", help="the batch, all real tokens (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of torch (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="measured steps (default: %(default)s)")
    parser.add_argument("--top", type=int, default=12, metavar="N", help="operators to show (default: %(default)s)")
    parser.add_argument("--inference", action="store_true", help="the encoder's forward alone, without gradients")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to run (default: cuda where there is one)")
    parser.set_defaults(run=profile_verb)


def add_plan_parser(subparsers) -> None:
    """Add `mixlm plan`."""
    parser = subparsers.add_parser(
        "plan",
        help="show what a training will need: memory by --zero, rows that fit, hours",
        description=(
            "Show, before a training is started, what a process will need of memory with each --zero, how many rows "
            "fit and, after a short training where this machine has as many GPUs or cores, tokens/s and hours. No "
            "memory is taken but by that training, so that a plan may be for a larger machine. The exit code is 2 if "
            "nothing fits."
        ),
        epilog=(
            "examples:\n  mixlm plan --preset mixlm-base\n"
            "  mixlm plan --config_file large.json --device cuda --world_size 8 --device_memory 80GB --bf16"
        ),
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--preset", metavar="NAME", help="a preset of either family")
    source.add_argument("--config_file", metavar="JSON", help="a configuration of either family")
    parser.add_argument("--task", choices=("SOP", "ICT"), default="SOP", help="default: %(default)s")
    parser.add_argument(
        "--zero", type=int, nargs="+", choices=range(4), metavar="0..3", help="default: all, with one process 0"
    )
    parser.add_argument("--sharding_backend", choices=("torch", "fairscale"), default="torch", help="default: torch")
    parser.add_argument("--auto_wrap", action="store_true", help="full sharding by blocks, as in training")
    parser.add_argument(
        "--world_size", type=int, metavar="N", help="processes (default: the GPUs that are here, or 1)"
    )
    parser.add_argument(
        "--device_memory", metavar="SIZE", help="of a process, such as 80GB (default: its share of what is free here)"
    )
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--fp16", action="store_true", help="matrix products in fp16")
    precision.add_argument("--bf16", action="store_true", help="matrix products in bf16")
    for option, default, what in (
        ("train_batch_size", 0, "rows of a forward pass of a process; 0 = as many as fit"),
        ("gradient_accumulation_steps", 1, "forward passes of a step"),
        ("max_seq_length", 128, "tokens of a row"),
        ("num_steps", 10_000, "optimizer steps"),
        ("probe_steps", 20, "steps of the short training; 0 = none"),
    ):
        parser.add_argument(
            f"--{option}", type=int, default=default, metavar="N", help=f"{what} (default: {default:,})"
        )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.set_defaults(run=plan_verb)


def add_verify_engines_parser(subparsers) -> None:
    """Add `mixlm verify-engines`."""
    parser = subparsers.add_parser(
        "verify-engines",
        help="show whether every sharding engine trains rightly on this machine",
        description=(
            "Train a small model with every engine (--zero, --sharding_backend, --auto_wrap) and precision on several "
            "processes, and compare with one process: losses, gradient norms, parameters and AdamW's moments after "
            "the last step, largest relative differences. Each engine trains twice and must give the same bits. The "
            "exit code is 1 if an engine is wrong."
        ),
        epilog="example:\n  mixlm verify-engines --processes 2",
    )
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="of an engine (default: %(default)s)")
    parser.add_argument("--family", choices=("mixlm", "switch"), default="mixlm", help="default: %(default)s")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("fp32", "bf16", "fp16"),
        default=["fp32", "bf16", "fp16"],
        help="default: all three",
    )
    parser.set_defaults(run=verify_engines_verb)


def add_convert_parser(subparsers) -> None:
    """Add `mixlm convert`."""
    parser = subparsers.add_parser(
        "convert",
        help="convert a checkpoint of the older implementation",
        description="Convert a checkpoint of the older implementation into a folder that from_pretrained loads.",
        epilog="example:\n  mixlm convert old.bin old_config.json my-model --family mixlm --head sop",
    )
    parser.add_argument("checkpoint", metavar="OLD.bin", help="the older weights; nothing but tensors is read from it")
    parser.add_argument("config", metavar="OLD_config.json", help="the older configuration")
    parser.add_argument("out", type=Path, metavar="OUT", help="the new folder")
    parser.add_argument("--family", required=True, choices=("mixlm", "switch"), help="the architecture")
    parser.add_argument("--head", required=True, choices=("sop", "ict"), help="what it was pretrained with")
    parser.set_defaults(run=convert_verb)


def _add_max_length(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max_length",
        type=int,
        default=512,
        metavar="N",
        help="longest input in tokens, for truncation; the model's max_position_embeddings (default: %(default)s)",
    )


def train_verb(arguments: argparse.Namespace) -> None:
    """`mixlm tokenizer train`."""
    _check_new_tokenizer(arguments)
    from .tokenization import train_tokenizer

    tokenizer = train_tokenizer(
        _read_sentences(arguments.corpus_path),
        arguments.vocab_size,
        lowercase=arguments.lowercase,
        min_frequency=arguments.min_frequency,
    )
    _save_tokenizer(tokenizer, arguments)
    if len(tokenizer) < arguments.vocab_size:
        print(
            f"These are fewer than the {arguments.vocab_size:,} asked for: the corpus has no more pieces that occur "
            f"{arguments.min_frequency} times. Set the model's vocab_size to {len(tokenizer)}, or give more text."
        )


def from_vocab_verb(arguments: argparse.Namespace) -> None:
    """`mixlm tokenizer from-vocab`."""
    _check_new_tokenizer(arguments)
    from .tokenization import tokenizer_from_vocab

    _save_tokenizer(tokenizer_from_vocab(arguments.vocab_file, lowercase=arguments.lowercase), arguments)


def report_verb(arguments: argparse.Namespace) -> None:
    """`mixlm tokenizer report`."""
    if arguments.corpus_path is None and not arguments.squad_file:
        raise UserError("nothing to measure: give --corpus_path, --squad_file or both")
    from .tokenization import load_tokenizer, tokenizer_report

    tokenizer = load_tokenizer(arguments.tokenizer)
    sentences = () if arguments.corpus_path is None else _read_sentences(arguments.corpus_path)
    report = tokenizer_report(tokenizer, sentences, arguments.squad_file)
    print(f"{arguments.tokenizer}: {type(tokenizer.backend_tokenizer.model).__name__}, {len(tokenizer):,} tokens")
    if arguments.corpus_path is not None:
        print(f"\n{arguments.corpus_path}")
        print(_table(_corpus_rows(report)))
    if arguments.squad_file:
        print(f"\n{', '.join(arguments.squad_file)}")
        print(_table(_answer_rows(report)))


def fill_mask_verb(arguments: argparse.Namespace) -> None:
    """`mixlm fill-mask`."""
    if arguments.top < 1:
        raise UserError(f"--top {arguments.top}: must be 1 or more")
    from safetensors import SafetensorError
    from transformers import AutoModelForMaskedLM, pipeline
    from transformers.utils.logging import disable_progress_bar

    import mixlm  # noqa: F401  registers the model families

    from .tokenization import load_tokenizer

    disable_progress_bar()
    tokenizer = load_tokenizer(arguments.model)
    masks = arguments.text.count(tokenizer.mask_token)
    if not masks:
        raise UserError(f"no {tokenizer.mask_token} in {arguments.text!r}; put it where a word is to be found")
    try:
        model = AutoModelForMaskedLM.from_pretrained(arguments.model)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"--model {arguments.model}: cannot be loaded: {error}") from error
    if arguments.top > model.config.vocab_size:
        raise UserError(f"--top {arguments.top}: the vocabulary has {model.config.vocab_size:,} tokens")
    length, longest = len(tokenizer(arguments.text).input_ids), model.config.max_position_embeddings
    if length > longest:
        raise UserError(f"the text has {length:,} tokens, the model takes {longest:,}; give a shorter one")
    answers = pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=arguments.top)(arguments.text)
    print(arguments.text)
    for number, of_mask in enumerate(answers if masks > 1 else [answers], start=1):
        if masks > 1:
            print(f"\nmask {number}")
        print(_table([(answer["token_str"], f"{answer['score']:.1%}", "") for answer in of_mask]))


def read_verb(arguments: argparse.Namespace) -> None:
    """`mixlm read`."""
    if (arguments.question is None) != (arguments.file is not None):
        raise UserError("give --question with --context or --context_file, or --file alone")
    if arguments.batch_size < 1:
        raise UserError(f"--batch_size {arguments.batch_size}: must be 1 or more")
    questions = _questions_to_read(arguments)
    from transformers.utils.logging import disable_progress_bar

    from .reader import MixLMReader

    disable_progress_bar()
    reader = MixLMReader.from_pretrained(arguments.model, batch_size=arguments.batch_size)
    names, texts, contexts = zip(*questions, strict=True)
    for name, answer in zip(names, reader.answers(texts, contexts), strict=True):
        if arguments.json:
            print(json.dumps({"id": name, **answer._asdict()}, ensure_ascii=False))
        elif len(questions) == 1:
            print(f"{answer.text or '(no answer)'}  {answer.score:.1%}  characters {answer.start} to {answer.end}")
        else:
            print(f"{name}  {answer.text or '(no answer)'}  {answer.score:.1%}")


def _questions_to_read(arguments: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Id, question and context of each question that `mixlm read` was given."""
    if arguments.file is None:
        try:
            context = arguments.context or arguments.context_file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--context_file {arguments.context_file}: cannot be read: {error}") from error
        if not arguments.question.strip() or not context.strip():
            raise UserError("--question and --context: both must hold text")
        return [("", arguments.question, context)]
    from .data.squad import read_squad

    examples = read_squad(arguments.file, to_learn_from=False).examples
    return [(example.id, example.question, example.context) for example in examples]


def report_runs_verb(arguments: argparse.Namespace) -> None:
    """`mixlm report`."""
    from .training.report import last_values, plot_curves, read_curves

    names = [folder.resolve().name for folder in arguments.runs]
    labels = names if len(set(names)) == len(names) else map(str, arguments.runs)
    runs = {label: read_curves(folder) for label, folder in zip(labels, arguments.runs, strict=True)}
    out = arguments.out or arguments.runs[0] / "curves.png"
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: name a file that ends in .png")
    plot_curves(runs, out)
    for name, curves in runs.items():
        print(name)
        print(_table([(tag, _significant(value), f"step {step:,}") for tag, step, value in last_values(curves)]))
    print(f"curves: {out}")


def profile_verb(arguments: argparse.Namespace) -> None:
    """`mixlm profile`."""
    for option in ("threads", "steps", "top"):
        if getattr(arguments, option) < 1:
            raise UserError(f"--{option} {getattr(arguments, option)}: must be 1 or more")
    shape = re.fullmatch("([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", arguments.shape)
    if shape is None:
        raise UserError(f"--shape {arguments.shape}: give rows x tokens, both from 1 to 999,999, such as 8x128")
    rows, length = map(int, shape.groups())
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu")
    from .profiling import EncoderForward, TrainingStep, profile_step, random_batch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    try:
        model = _model_to_profile(arguments, length).to(device)
        batch = {name: inputs.to(device) for name, inputs in random_batch(model.config, rows, length).items()}
        step = EncoderForward(model, batch) if arguments.inference else TrainingStep(model, batch)
        profile = profile_step(step, arguments.steps)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"--shape {arguments.shape}: too large for the memory of {device}; give fewer rows or tokens"
        ) from error

    kind = f"{model.config.pretraining_objective.upper()} training step"
    print(f"{arguments.preset or arguments.model}: {'encoder forward' if arguments.inference else kind}")
    print(_table(_setting_rows(model, rows, length, arguments.threads)))
    print("\ntime")
    print(_table(_time_rows(profile, arguments.steps)))
    print("\narithmetic")
    print(_table(_arithmetic_rows(profile)))
    print(f"\noperators{', time of their kernels' if device == 'cuda' else ''}")
    print(_table(_operator_rows(profile.operators, arguments.top)))
    print("\nmemory")
    print(_table(_memory_rows(profile.memory, arguments.inference)))


def plan_verb(arguments: argparse.Namespace) -> None:
    """`mixlm plan`."""
    for option, least in (
        *(("world_size", 1), ("train_batch_size", 0), ("gradient_accumulation_steps", 1)),
        *(("max_seq_length", 8), ("num_steps", 1), ("probe_steps", 0)),
    ):
        value, most = getattr(arguments, option), 10_000 if option == "world_size" else 10**9
        if value is not None and not least <= value <= most:
            raise UserError(f"--{option} {value}: must be from {least} to {most:,}")
    import torch
    from tqdm import tqdm

    from .planning import Setting, make_plans, probe, read_config, why_no_probe
    from .training.batch_size import MARGIN
    from .training.memory import MemoryMeter, parse_memory

    name, length = arguments.preset or arguments.config_file, arguments.max_seq_length
    if arguments.preset is not None:
        _require_preset(arguments.preset)
    config = read_config(name, pretraining_objective=arguments.task.lower())
    if length > config.max_position_embeddings:
        raise UserError(
            f"--max_seq_length {length}: above max_position_embeddings={config.max_position_embeddings} of {name}"
        )
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    ranks = arguments.world_size or (torch.cuda.device_count() if device == "cuda" else 1) or 1
    if arguments.device_memory is not None:
        memory = parse_memory("--device_memory", arguments.device_memory)
    elif device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device_memory is missing: give that of a GPU, such as 80GB, for there is none here")
    else:
        memory = MemoryMeter(torch.device(device)).available() // (ranks if device == "cpu" else 1)
    budget = int((1 - MARGIN) * memory)

    precision = "fp16" if arguments.fp16 else "bf16" if arguments.bf16 else "fp32"
    accumulates = arguments.gradient_accumulation_steps > 1
    settings = [
        Setting(zero, arguments.sharding_backend, arguments.auto_wrap, ranks, precision, accumulates, device)
        for zero in sorted(set(arguments.zero or (range(4) if ranks > 1 else [0])))
    ]
    speeds: list[float | None] = []
    reasons: list[str] = []
    with tqdm(desc="planning", total=2 * len(settings), delay=2, leave=False, disable=None) as progress:
        plans = []
        for plan in make_plans(config, length, settings, arguments.train_batch_size, budget):
            plans.append(plan)
            progress.update()
        for plan in plans:
            speed, reason = None, why_no_probe(plan) if arguments.probe_steps else "--probe_steps 0"
            if reason is None:
                try:
                    speed = probe(config, plan, length, arguments.probe_steps)
                except UserError as error:
                    reason = f"--zero {plan.setting.zero}: {error}"
            speeds.append(speed)
            reasons += [] if reason is None else [reason]
            progress.update()

    print(
        f"{name}: {plans[0].numbers:,} parameters, {arguments.task}, {precision}, {length:,} tokens a row, "
        f"{ranks:,} {'process' if ranks == 1 else 'processes'} on {device}"
    )
    print(
        f"A process may use {budget / 1e6:,.0f} of {memory / 1e6:,.0f} MB. In MB, of the process that needs most, "
        "when it needs most:"
    )
    print(_table(_plan_rows(plans, speeds, arguments, length)))
    for reason in dict.fromkeys(reasons):
        print(f"no tokens/s: {reason}")
    if ranks == 1 and settings[-1].zero:
        print("One process has nothing to share out: every --zero is as 0.")
    fitting = [plan for plan in plans if plan.rows <= plan.most_rows]
    if not fitting:
        least = min(plans, key=lambda plan: plan.use.total)
        raise UserError(
            f"nothing fits: with --zero {least.setting.zero} a process needs {least.use.total / 1e6:,.0f} MB at the "
            f"{least.use.moment}, and may use {budget / 1e6:,.0f}; use a smaller --train_batch_size or "
            "--max_seq_length, --auto_wrap, more --world_size, or a smaller model"
        )
    print(f"--zero {fitting[0].setting.zero} is enough. Give run_pretraining.py, with corpus and tokenizer:")
    print(f"  {_plan_flags(fitting[0], config.model_type, arguments)}")


def _plan_rows(
    plans: "list[Plan]", speeds: list[float | None], arguments: argparse.Namespace, length: int
) -> list[tuple[str, ...]]:
    kinds = ("parameters", "gradients", "optimizer", "activations", "exchange")
    rows = [("zero", "rows", *kinds, "peak", "most rows", "tokens/s", "hours", "")]
    texts = 1 if arguments.task == "SOP" else 2
    for plan, speed in zip(plans, speeds, strict=True):
        forward_passes = plan.setting.ranks * arguments.gradient_accumulation_steps * arguments.num_steps
        tokens = texts * length * plan.rows * forward_passes
        rows.append(
            (
                *(f"{plan.setting.zero}", f"{plan.rows:,}"),
                *(f"{getattr(plan.use, kind) / 1e6:,.0f}" for kind in kinds),
                *(f"{plan.use.total / 1e6:,.0f}", f"{plan.most_rows:,}"),
                *(("-", "-") if speed is None else (f"{speed:,.0f}", f"{tokens / speed / 3600:,.1f}")),
                f"{plan.use.moment}{'' if plan.rows <= plan.most_rows else ': does not fit'}",
            )
        )
    return rows


def _plan_flags(plan: "Plan", model_type: str, arguments: argparse.Namespace) -> str:
    """What `run_pretraining.py` is to be given for a plan, without what is its default."""
    setting = plan.setting
    source = f"--preset {arguments.preset}" if arguments.preset else f"--config_file {arguments.config_file}"
    flags = [
        *(["--family switch"] if model_type == "mixlm_switch" else []),
        *(source, f"--task {arguments.task}", f"--max_seq_length {arguments.max_seq_length}"),
        *(f"--train_batch_size {plan.rows}", f"--num_steps {arguments.num_steps}"),
    ]
    if arguments.gradient_accumulation_steps > 1:
        flags.append(f"--gradient_accumulation_steps {arguments.gradient_accumulation_steps}")
    if setting.zero:
        flags += [f"--zero {setting.zero}", f"--sharding_backend {setting.sharding_backend}"]
    if setting.auto_wrap and setting.zero >= 2:
        flags.append("--auto_wrap")
    if setting.precision != "fp32":
        flags.append(f"--{setting.precision}")
    return " ".join(flags)


def verify_engines_verb(arguments: argparse.Namespace) -> None:
    """`mixlm verify-engines`."""
    if not 2 <= arguments.processes <= 8:
        raise UserError(f"--processes {arguments.processes}: must be from 2 to 8")
    import torch

    from .training.verification import available_cases, verify_engines

    gpus = torch.cuda.device_count()
    if 0 < gpus < arguments.processes:
        raise UserError(f"--processes {arguments.processes}: each needs a GPU of its own, and there are {gpus} here")
    cases = available_cases()
    device = "GPUs" if gpus else "the CPU"
    print(f"{len(cases)} engines, {arguments.processes} processes each, on {device}: a minute or less for each")
    print(
        f"{'engine':<28}{'precision':<11}{'loss':>8}{'norm':>9}{'weights':>9}{'moments':>9}"
        f"  {'repeats':<9}{'MiB/rank':>8}{'samples/s':>11}  verdict"
    )

    def report(now: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K... {now}", end="", file=sys.stderr, flush=True)

    verdicts = []
    for verdict in verify_engines(cases, arguments.processes, arguments.family, arguments.precision, report):
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        verdicts.append(verdict)
        row = f"{verdict.case.name:<28}{verdict.precision:<11}"
        if verdict.differences is None:
            print(f"{row}FAILED: {verdict.failure}", flush=True)
            continue
        differences = "".join(f"{value:>9.0e}" for value in verdict.differences)[1:]
        print(
            f"{row}{differences}  {'yes' if verdict.is_repeatable else 'NO':<9}{verdict.peak_bytes / 2**20:>8.0f}"
            f"{verdict.samples_per_second:>11.0f}  {'right' if verdict.is_right else 'WRONG'}",
            flush=True,
        )
    wrong = [verdict for verdict in verdicts if not verdict.is_right]
    print(f"{len(verdicts) - len(wrong)} of {len(verdicts)} are right")
    if wrong:
        sys.exit(1)


def convert_verb(arguments: argparse.Namespace) -> None:
    """`mixlm convert`."""
    require_free(arguments.out)
    from transformers.utils.logging import disable_progress_bar

    from .conversion import convert_checkpoint

    disable_progress_bar()
    convert_checkpoint(arguments.checkpoint, arguments.config, arguments.out, arguments.family, arguments.head)
    print(f"converted into {arguments.out}; load it with from_pretrained")


def _read_sentences(corpus_path: str) -> Iterator[str]:
    from .data.corpus import read_documents

    return (sentence for document in read_documents(corpus_path) for sentence in document.sentences)


def _check_new_tokenizer(arguments: argparse.Namespace) -> None:
    """Refuse what would fail at the end of the work before it begins."""
    if arguments.max_length < 3:
        raise UserError(f"--max_length {arguments.max_length}: must be 3 or more, for [CLS], one token and [SEP]")
    require_free(arguments.out)


def _save_tokenizer(tokenizer: "PreTrainedTokenizerFast", arguments: argparse.Namespace) -> None:
    tokenizer.model_max_length = arguments.max_length
    with new_folder(arguments.out) as folder:
        try:
            tokenizer.save_pretrained(folder)
        except OSError:
            raise
        except Exception as error:  # the `tokenizers` library has no other class for a full disk
            raise OSError(str(error)) from error
    print(f"{len(tokenizer):,} tokens saved in {arguments.out}")
    print(f'Load it with AutoTokenizer.from_pretrained("{arguments.out}").')


def _corpus_rows(report: "TokenizerReport") -> list[tuple[str, str, str]]:
    return [
        ("sentences", f"{report.sentences:,}", ""),
        ("eojeols", f"{report.eojeols:,}", "words between blanks"),
        ("characters", f"{report.characters:,}", "without blanks"),
        ("tokens", f"{report.tokens:,}", "without [CLS] and [SEP]"),
        ("tokens per eojeol", _number(report.tokens_per_eojeol, ".3f"), "lower: shorter inputs"),
        ("tokens per character", _number(report.tokens_per_character, ".3f"), ""),
        ("unknown tokens", f"{report.unknown_tokens:,}", ""),
        ("unknown rate", _number(report.unk_rate, ".4%"), "text the model cannot see"),
    ]


def _answer_rows(report: "TokenizerReport") -> list[tuple[str, str, str]]:
    return [
        ("answers", f"{report.answers:,}", "distinct (question, answer) pairs"),
        ("misplaced answers", f"{report.misplaced_answers:,}", "not at their offset; left out"),
        ("on token borders", f"{report.answers_on_token_borders:,}", ""),
        ("EM ceiling", _number(report.em_ceiling, ".2%"), "exact match that a perfect reader would reach"),
    ]


def _significant(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _model_to_profile(arguments: argparse.Namespace, length: int) -> "PreTrainedModel":
    from transformers.utils.logging import disable_progress_bar

    from .profiling import preset_model, saved_model

    if arguments.model is not None:
        disable_progress_bar()
        return saved_model(arguments.model, length, arguments.inference)
    _require_preset(arguments.preset)
    return preset_model(arguments.preset, length, arguments.inference)


def _require_preset(name: str) -> None:
    from .configuration import preset_names

    names = preset_names()
    if name not in names:
        hint = _did_you_mean(name, names) or f"; presets: {', '.join(names)}"
        raise UserError(f"--preset {name}: unknown preset{hint}")


def _setting_rows(model: "PreTrainedModel", rows: int, length: int, threads: int) -> list[tuple[str, str, str]]:
    import torch

    device = "cpu" if model.device.type == "cpu" else torch.cuda.get_device_name(model.device)
    return [
        ("parameters", f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:,.1f}M", "float32"),
        ("shape", f"{rows} x {length}", "rows x tokens"),
        ("threads", f"{threads}", device),
        ("torch", torch.__version__, ""),
    ]


def _time_rows(profile: "Profile", steps: int) -> list[tuple[str, str, str]]:
    whole = profile.step_seconds
    phases = profile.phase_seconds.items() if len(profile.phase_seconds) > 1 else ()
    return [
        *((name, f"{seconds * 1000:,.1f} ms", f"{seconds / whole:.1%} of the step") for name, seconds in phases),
        ("step", f"{whole * 1000:,.1f} ms", f"median of {steps}, after one to warm up"),
        ("speed", f"{profile.tokens / whole:,.0f} tokens/s", "real tokens"),
    ]


def _arithmetic_rows(profile: "Profile") -> list[tuple[str, str, str]]:
    return [
        ("operations", f"{profile.operations / 1e9:,.3f} GFLOP", "matrix products, convolutions, fused attention"),
        ("rate", f"{profile.rate / 1e9:,.1f} GFLOP/s", ""),
        ("peak rate", f"{profile.peak_rate / 1e9:,.1f} GFLOP/s", "the fastest large matrix product here"),
        ("used", f"{profile.rate / profile.peak_rate:.1%}", "rate / peak rate"),
    ]


def _operator_rows(operators: "list[OperatorTime]", top: int) -> list[tuple[str, ...]]:
    from .profiling import summarize_operators

    return [
        ("", "calls/step", "ms/step", "share", ""),
        *(
            (operator.name, f"{operator.calls:,.0f}", f"{operator.seconds * 1000:,.2f}", f"{operator.share:.1%}", "")
            for operator in summarize_operators(operators, top)
        ),
    ]


def _memory_rows(memory: "MemoryUse", inference: bool) -> list[tuple[str, str, str]]:
    training = [
        ("gradients", memory.gradients, ""),
        ("optimizer state", memory.optimizer_state, ""),
        ("activations", memory.activations, "kept by the forward for the backward pass"),
    ]
    rows = [
        ("parameters", memory.parameters, ""),
        *([] if inference else training),
        ("temporary", memory.temporary, "the most at a time of all other tensors"),
        ("peak", memory.peak, "the most at a time of all together; without buffers within an operator"),
    ]
    return [(name, f"{size / 2**20:,.1f} MiB", remark) for name, size, remark in rows]


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _table(rows: list[tuple[str, ...]]) -> str:
    """Rows of a name, values and a remark, with the values aligned on the right and the others on the left."""
    widths = [max(map(_columns, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *values, remark in rows:
        cells = [name + " " * (widths[0] - _columns(name))]
        cells += [" " * (width - _columns(value)) + value for width, value in zip(widths[1:-1], values, strict=True)]
        lines.append("  ".join(["", *cells, remark]).rstrip())
    return "\n".join(lines)


def _columns(text: str) -> int:
    """Columns of a terminal that `text` takes: a Hangul syllable takes two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


if __name__ == "__main__":
    main()
