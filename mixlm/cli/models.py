"""`mixlm fill-mask`, `read` and `convert`: what is done with a model."""

import argparse
import json
import unicodedata
from dataclasses import replace
from pathlib import Path

from ..errors import UserError, one_line
from ..files import require_free
from .options import question_of, require_positive, text_of
from .tables import table


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
            '"id", "question" and "context", one answer a line.'
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
        "--korean_particles",
        action="store_true",
        help="drop particles (josa) from the end of answers, also where the reader's own decoding keeps them",
    )
    parser.add_argument(
        "--json", action="store_true", help="JSON lines: id, text, start, end (characters), score, null_odds"
    )
    parser.set_defaults(run=read_verb)


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


def fill_mask_verb(arguments: argparse.Namespace) -> None:
    """`mixlm fill-mask`."""
    require_positive(arguments, "top")
    # A vocabulary has syllables, and not the letters that decomposed ones consist of.
    text = unicodedata.normalize("NFC", text_of("the text", arguments.text))
    from transformers import AutoModelForMaskedLM, pipeline
    from transformers.utils.logging import disable_progress_bar

    import mixlm  # noqa: F401  registers the model families

    from ..loading import load_model
    from ..tokenization import load_tokenizer

    disable_progress_bar()
    tokenizer = load_tokenizer(arguments.model)
    masks = text.count(tokenizer.mask_token)
    if not masks:
        raise UserError(f"no {tokenizer.mask_token} in {text!r}; put it where a word is to be found")
    model, missing = load_model(AutoModelForMaskedLM, arguments.model)
    if missing:
        raise UserError(
            f"--model {arguments.model}: lacks {len(missing)} weights that fill masks, such as {missing[0]}; use a "
            "model that was trained with masked tokens"
        )
    if arguments.top > model.config.vocab_size:
        raise UserError(f"--top {arguments.top}: the vocabulary has {model.config.vocab_size:,} tokens")
    length, longest = len(tokenizer(text).input_ids), model.config.max_position_embeddings
    if length > longest:
        raise UserError(f"the text has {length:,} tokens, the model takes {longest:,}; give a shorter one")
    answers = pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=arguments.top)(text)
    print(text)
    for number, of_mask in enumerate(answers if masks > 1 else [answers], start=1):
        if masks > 1:
            print(f"\nmask {number}")
        print(table([(answer["token_str"], f"{answer['score']:.1%}", "") for answer in of_mask]))


def read_verb(arguments: argparse.Namespace) -> None:
    """`mixlm read`."""
    if (arguments.question is None) != (arguments.file is not None):
        raise UserError("give --question with --context or --context_file, or --file alone")
    require_positive(arguments, "batch_size")
    questions = _questions_to_read(arguments)
    from transformers.utils.logging import disable_progress_bar

    from ..reader import MixLMReader

    disable_progress_bar()
    reader = MixLMReader.from_pretrained(arguments.model, batch_size=arguments.batch_size)
    if arguments.korean_particles:
        reader.decoding = replace(reader.decoding, korean_particles=True)
    names, texts, contexts = zip(*questions, strict=True)
    for name, answer in zip(names, reader.answers(texts, contexts), strict=True):
        shown = f"{one_line(answer.text) or '(no answer)'}  {answer.score:.1%}"
        if arguments.json:
            print(json.dumps({"id": name, **answer._asdict()}, ensure_ascii=False))
        elif len(questions) == 1:
            print(f"{shown}  characters {answer.start} to {answer.end}")
        else:
            print(f"{name}  {shown}")


def _questions_to_read(arguments: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Id, question and context of each question that `mixlm read` was given."""
    if arguments.file is None:
        question, context = question_of("--question", arguments.question), arguments.context
        if context is None:
            try:
                # Without a byte order mark, and line breaks as they are: an answer is a place in the file.
                context = arguments.context_file.read_bytes().decode("utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"--context_file {arguments.context_file}: cannot be read: {error}") from error
        if not context.strip():
            raise UserError("--context or --context_file: is empty; give the text that the question is about")
        return [("", question, text_of("--context", context))]
    from ..data.squad import read_squad, require_asked

    examples = read_squad(arguments.file, to_learn_from=False).examples
    if not examples:
        raise UserError(f"--file {arguments.file}: no questions in it")
    require_asked(examples, arguments.file)
    return [(example.id, example.question, example.context) for example in examples]


def convert_verb(arguments: argparse.Namespace) -> None:
    """`mixlm convert`."""
    require_free(arguments.out)
    from transformers.utils.logging import disable_progress_bar

    from ..conversion import convert_checkpoint

    disable_progress_bar()
    convert_checkpoint(arguments.checkpoint, arguments.config, arguments.out, arguments.family, arguments.head)
    print(f"converted into {arguments.out}; load it with from_pretrained")
