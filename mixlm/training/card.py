"""The model card: README.md of a model's folder, written from what the run has left there.

The card ends with a hash of itself. Where it no longer fits, a person has written in it, and it is theirs.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from safetensors import SafetensorError, safe_open

from .. import __version__
from ..data.text_files import write_text
from ..errors import UserError, one_line
from ..evaluation.reading_report import QUESTIONS_FILE, load_judged
from ..hub import CARD_FILE, WEIGHTS
from .record import RESULTS_FILE, read_record
from .report import plot_curves, plot_reading, read_curves

CURVES_FILE, READING_FILE = "curves.png", "reading.png"
LISTED_FILES = 20  # of the data of one argument; run.json has all
_MARK = re.compile(r"\n<!-- Written by mixlm (?:\S+); of the text above: blake2b (?P<hash>[0-9a-f]{32}) -->\n?\Z")
# Of eval_results.json, what is not a measure of quality.
_COUNTS = ("examples", "missing", "total", "_thresh")
_CODE_SETTINGS = ("auto_map", "architectures", "transformers_version", "dtype")


@dataclass(frozen=True)
class Head:
    """What a card says of the models with one head.

    Attributes:
        pipeline_tag: the Hub's name of the task.
        what: the model is.
        use: what it is for.
        limits: what it does not do.
        example: code that needs transformers alone; NAME, MASKED, QUESTION, TEXT and LENGTH stand for what differs.
        own_example: the same with mixlm, where that does more.
    """

    pipeline_tag: str
    what: str
    use: str
    limits: str
    example: str
    own_example: str


_PRETRAINED = Head(
    "fill-mask",
    "a pretrained encoder",
    "To be fine-tuned for machine reading (`run_mrc.py`) and retrieval (`run_ict.py`) or other tasks on text, and to "
    "fill masks. Its vectors are not trained to be compared before that.",
    "What it puts in place of a mask is likely, and not true.",
    """\
from transformers import AutoModel, pipeline

fill_mask = pipeline("fill-mask", model="NAME", trust_remote_code=True)
print(fill_mask("MASKED"))
vectors = pipeline("feature-extraction", model="NAME", trust_remote_code=True)
print(len(vectors("TEXT")[0]), "tokens")
encoder = AutoModel.from_pretrained("NAME", trust_remote_code=True)  # for other heads and uses
""",
    """\
import mixlm  # from here on the Auto classes know the model without trust_remote_code
from transformers import AutoModelForPreTraining

model = AutoModelForPreTraining.from_pretrained("NAME")
""",
)
_READER = Head(
    "question-answering",
    "a reader: it finds the answer to a question in a text",
    "To mark the answer to a question in a text that has one, as a span of it.",
    "It answers from the given text alone, and a span with a high score may be wrong. Where questions may have no "
    "answer, `reader.json` has the threshold by which mixlm says so; the code without mixlm takes the best span.",
    """\
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("NAME")
model = AutoModelForQuestionAnswering.from_pretrained("NAME", trust_remote_code=True)
question, text = "QUESTION", "TEXT"
inputs = tokenizer(question, text, truncation="only_second", max_length=LENGTH, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
start = outputs.start_logits[0].argmax()
end = start + outputs.end_logits[0, start:].argmax()
print(tokenizer.decode(inputs.input_ids[0, start : end + 1]))
""",
    """\
from mixlm.reader import MixLMReader

reader = MixLMReader.from_pretrained("NAME")  # also for texts longer than a window
print(next(iter(reader.answers(["QUESTION"], ["TEXT"]))))
""",
)
_RETRIEVER = Head(
    "feature-extraction",
    "a retriever: questions and passages become vectors, and those that belong together have a large inner product",
    "To find passages that answer a question among those of an index.",
    "Inner products rank the passages for one question; they are no probabilities, and not comparable between "
    "questions. The passage with the largest may not hold the answer.",
    """\
import torch
from transformers import AutoModelForTextEncoding, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("NAME")
model = AutoModelForTextEncoding.from_pretrained("NAME", trust_remote_code=True)
options = {"padding": True, "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
questions, passages = tokenizer(["QUESTION"], **options), tokenizer(["TEXT", "QUESTION"], **options)
with torch.no_grad():
    vectors = model(input_ids=questions.input_ids, attention_mask=questions.attention_mask).embeddings
    outputs = model(context_input_ids=passages.input_ids, context_attention_mask=passages.attention_mask)
print(vectors @ outputs.context_embeddings.T)
""",
    """\
from mixlm.data.passages import Passage
from mixlm.encoder import MixLMEncoder

encoder = MixLMEncoder.from_pretrained("NAME")  # with the lengths and titles of its training
print(encoder.encode_queries(["QUESTION"]) @ encoder.encode_passages([Passage("1", "", "TEXT")]).T)
""",
)
_ENCODER = Head(
    "feature-extraction",
    "an encoder without a head",
    "To be fine-tuned, or to make vectors of tokens.",
    "Its vectors are not trained to be compared.",
    """\
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("NAME")
model = AutoModel.from_pretrained("NAME", trust_remote_code=True)
print(model(**tokenizer("TEXT", return_tensors="pt")).last_hidden_state.shape)
""",
    """\
import mixlm  # from here on the Auto classes know the model without trust_remote_code
from transformers import AutoModel

model = AutoModel.from_pretrained("NAME")
""",
)
HEADS = {
    "PreTraining": _PRETRAINED,
    "MaskedLM": _PRETRAINED,
    "QuestionAnswering": _READER,
    "Retrieval": _RETRIEVER,
    "": _ENCODER,
}
_EXAMPLES = {
    "ko": {
        "MASKED": "대한민국의 수도는 [MASK]이다.",
        "QUESTION": "가장 큰 섬은 어디인가?",
        "TEXT": "제주도는 우리나라에서 가장 큰 섬이다.",
    },
    "en": {
        "MASKED": "The capital of Korea is [MASK].",
        "QUESTION": "Which island is the largest?",
        "TEXT": "Jeju is the largest island of Korea.",
    },
}


def is_generated(card: str) -> bool:
    """Whether a card is as it was written here, without a change by a person."""
    found = _MARK.search(card)
    return found is not None and _hash(card[: found.start()]) == found["hash"]


def write_card(folder: Path, name: str, license: str | None, step: int | None = None) -> list[str]:
    """Write README.md and its pictures into a model's folder; a README.md that a person has written stays.

    Args:
        folder: with a finished model. The more of what a run leaves is there, the more the card says.
        name: USER/NAME on the Hub.
        license: as the Hub abbreviates it. None is that of the run, or apache-2.0.
        step: after which the training was not over yet; None if it was.

    Returns:
        lines that the user should see.

    Raises:
        UserError: a file there is not what it should be, or the card cannot be written.
    """
    file = folder / CARD_FILE
    try:
        if file.exists() and not is_generated(file.read_text("utf-8")):
            return [f"{file} was written by hand and is pushed as it is; without it a new one would be written"]
        notes = [] if step is not None else _draw(folder)
        # JSON can hold halves of surrogate pairs, and a file cannot.
        text = _Card(folder, name, license, step).text().encode("utf-8", "replace").decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8: {one_line(error)}") from error
    except SafetensorError as error:
        raise UserError(f"{folder}: its weights are damaged: {one_line(error)}") from error
    except OSError as error:
        raise UserError(f"{folder}: the model card cannot be written: {one_line(error)}") from error
    write_text(file, [text, f"\n<!-- Written by mixlm {__version__}; of the text above: blake2b {_hash(text)} -->\n"])
    return notes


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def _draw(folder: Path) -> list[str]:
    """Draw the pictures that `mixlm report` draws, where there is something to draw; what prevented it is returned."""
    name = folder.resolve().name
    try:
        if (curves := read_curves(folder)) and any(tag.startswith("train/") for tag in curves):
            plot_curves({name: curves}, folder / CURVES_FILE)
        if (folder / QUESTIONS_FILE).exists():
            plot_reading(name, load_judged(folder / QUESTIONS_FILE), folder / READING_FILE)
    except UserError as error:
        return [f"the card is without curves: {error}"]
    return []


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a file; nothing where it is absent."""
    try:
        found = json.loads(file.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read: {one_line(error)}") from error
    return found


class _Card:
    """What is known of a model, and the sections that tell it."""

    def __init__(self, folder: Path, name: str, license: str | None, step: int | None):
        self.folder, self.name, self.step = folder, name, step
        self.config = _read_json(folder / "config.json")
        self.results = {
            key.removeprefix("eval/"): value
            for key, value in _read_json(folder / RESULTS_FILE).items()
            if isinstance(value, int | float) and abs(value) <= sys.float_info.max
        }
        self.record = read_record(folder) or {}
        self.arguments = self.record.get("arguments", {})
        self.license = license or self.arguments.get("hub_license", "apache-2.0")
        self.languages = self.record.get("languages", [])
        self.model_type = str(self.config.get("model_type", "unknown"))
        architectures = self.config.get("architectures")
        architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
        self.head = HEADS.get(architecture.partition("For")[2], _ENCODER)
        longest = self.config.get("max_position_embeddings")
        self.longest = longest if isinstance(longest, int) else 0

    def text(self) -> str:
        """The whole card, without its mark."""
        sections: tuple[Callable[[], str], ...] = (
            *(self.introduction, self.use, self.loading, self.measured, self.data),
            *(self.configuration, self.training, self.licences),
        )
        body = "\n\n".join(text.strip() for section in sections if (text := section()))
        return f"---\n{self.metadata()}\n---\n\n{body}\n"

    def metadata(self) -> str:
        """What the Hub reads of the card, in YAML."""
        quality = {key: value for key, value in self.results.items() if not key.endswith(_COUNTS)}
        evaluated_on = self.evaluated_on()
        results = [
            EvalResult(
                task_type=self.head.pipeline_tag,
                # The Hub wants it in ASCII, and not empty.
                dataset_type=re.sub(r"[^A-Za-z0-9]+", "-", evaluated_on).strip("-").lower() or "unknown",
                dataset_name=evaluated_on,
                metric_type=key,
                metric_name=key,
                metric_value=value,
            )
            for key, value in quality.items()
        ]
        base_model = (self.record.get("base_model") or {}).get("hub_model_id")
        datasets = [each["name"] for each in self.record.get("data", ()) if "fingerprints" in each]
        card_data = ModelCardData(
            language=self.languages or None,
            license=self.license,
            library_name="transformers",
            tags=list(dict.fromkeys(["mixlm", self.model_type])),
            pipeline_tag=self.head.pipeline_tag,
            base_model=base_model,
            datasets=datasets or None,
            model_name=self.name.partition("/")[2] if results else None,
            eval_results=results or None,
        )
        return card_data.to_yaml()

    def introduction(self) -> str:
        family = {"mixlm": "MixLM", "mixlm_switch": "Switch"}.get(self.model_type, self.model_type)
        base = self.record.get("base_model")
        made = f", and was fine-tuned from {base.get('hub_model_id') or base['name']}" if base else ""
        unfinished = ""
        if self.step is not None:
            unfinished = (
                f"\n\n**This is the model after step {self.step:,} of {self.arguments['num_steps']:,}**: its training "
                "goes on, and the next push replaces it."
            )
        return (
            f"# {self.name.partition('/')[2]}\n\n"
            f"This is {self.head.what}. It has {_parameters(self.folder):,} parameters, is of the family {family} of "
            f"mixlm{made}. {self.tongues()}{unfinished}"
        )

    def tongues(self) -> str:
        """A sentence about the languages."""
        names = [{"ko": "Korean", "en": "English"}.get(language, language) for language in self.languages]
        return f"It was trained on {' and '.join(names)} text." if names else ""

    def use(self) -> str:
        return (
            f"## Intended use and limits\n\n{self.head.use}\n\n"
            f"* {self.head.limits}\n"
            f"* It takes up to {self.longest:,} tokens at once.\n"
            "* It knows the languages and subjects of its data, and no others; what the data has of errors and "
            "prejudice, it has learned too.\n"
            "* It was measured on what is named below and nowhere else. Measure it on your own data, and let nothing "
            "that matters to people be decided by it alone."
        )

    def loading(self) -> str:
        example = _EXAMPLES["en" if self.languages == ["en"] else "ko"]
        lengths = ("max_seq_length", "max_passage_length")
        length = next((self.arguments[key] for key in lengths if key in self.arguments), None)
        values = {**example, "NAME": self.name, "LENGTH": str(length or self.longest)}
        without, own = (
            re.sub("|".join(values), lambda match: values[match[0]], code)
            for code in (self.head.example, self.head.own_example)
        )
        return (
            f"## Loading it\n\nWith transformers 5.23 or newer alone (`trust_remote_code=True` runs the Python files "
            f"of this repository: read them, and name the revision you have read):\n\n```python\n{without}```\n\n"
            f"With mixlm installed, whose own code is then used:\n\n```python\n{own}```"
        )

    def measured(self) -> str:
        if not self.results and not (self.folder / CURVES_FILE).exists():
            return ""
        rows = "".join(f"| {key} | {_number(value)} |\n" for key, value in self.results.items())
        table = f"On {self.evaluated_on()}:\n\n| measure | value |\n|---|---|\n{rows}\n" if rows else ""
        pictures = [
            f"![{title}]({file})\n"
            for title, file in (("Curves of the training", CURVES_FILE), ("Where answers go wrong", READING_FILE))
            if (self.folder / file).exists()
        ]
        return f"## Results\n\n{table}" + "\n".join(pictures)

    def evaluated_on(self) -> str:
        """What the results are of, in a few words."""
        names = {each["argument"]: each["name"] for each in self.record.get("data", ())}
        if "validation_file" in names:
            return _and_articles(names["validation_file"], self.arguments.get("validation_articles"))
        if "corpus_path" in names or "mlm_probability" in self.arguments:
            return f"held-out documents of {names.get('corpus_path') or names.get('dataset_name')}"
        if "train_file" in names:
            part = self.arguments.get("validation_articles")
            return _and_articles(names["train_file"], part) if part else f"held-out articles of {names['train_file']}"
        return f"held-out part of {names['dataset_name']}" if names else "data that is not recorded"

    def data(self) -> str:
        if not self.record:
            return ""
        lines = []
        for entry in self.record["data"]:
            if "fingerprints" in entry:
                prints = ", ".join(f"{split} `{found}`" for split, found in entry["fingerprints"].items())
                lines.append(f"* `--{entry['argument']}` {entry['name']}, fingerprints of `datasets`: {prints}")
                continue
            files = entry["files"]
            size = sum(file["bytes"] for file in files)
            lines.append(f"* `--{entry['argument']}` {entry['name']}: {len(files):,} files, {size:,} bytes")
            for file in files[:LISTED_FILES]:
                lines.append(f"  * {file['name']}, {file['bytes']:,} bytes, `{file['blake2b']}`")
            if len(files) > LISTED_FILES:
                lines.append(f"  * and {len(files) - LISTED_FILES:,} more, which are in run.json")
        about = "Hashes are BLAKE2b of 128 bits, as `b2sum --length 128 FILE` prints them."
        return f"## Data\n\n{about}\n\n" + "\n".join(lines)

    def configuration(self) -> str:
        fields = {key: value for key, value in self.config.items() if key not in _CODE_SETTINGS and value is not None}
        rows = "".join(f"| {key} | {json.dumps(value)} |\n" for key, value in fields.items())
        return f"## Configuration\n\n| field | value |\n|---|---|\n{rows}"

    def training(self) -> str:
        if not self.record:
            return ""
        commands = ""
        for each in self.record["commands"]:
            went_on = f"  # went on after step {each['first_step']:,}" if each["first_step"] else ""
            commands += f"$ {each['command']}{went_on}\n"
        ranks = self.arguments.get("processes", 1)
        versions = ", ".join(f"{name} {found}" for name, found in self.record["versions"].items())
        settings = json.dumps(self.arguments, indent=2, ensure_ascii=False)
        return (
            f"## Training\n\nOn {ranks} process{'es' if ranks > 1 else ''} ({self.record['device']}):\n\n"
            f"```console\n{commands}```\n\nVersions: {versions}.\n\n"
            f"<details><summary>All arguments</summary>\n\n```json\n{settings}\n```\n\n</details>"
        )

    def licences(self) -> str:
        return f"## Licence\n\nThe model: {self.license}. The Python files beside it are mixlm's, under Apache-2.0."


def _and_articles(name: str, articles: str | None) -> str:
    return f"articles {articles} of {name}" if articles else name


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.4f}"


def _parameters(folder: Path) -> int:
    """How many numbers the weights hold; what layers share is counted once."""
    count = 0
    for pattern in WEIGHTS:
        for file in folder.glob(pattern):
            with safe_open(file, "pt") as weights:
                count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
    return count
