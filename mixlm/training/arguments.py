"""What a training script can be told, on the command line or in one JSON file."""

import dataclasses
import difflib
import json
import math
import sys
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

from transformers import HfArgumentParser

from ..data.corpus import corpus_files
from ..errors import UserError, one_line
from ..hub import require_repository_name
from .memory import parse_memory

Arguments = TypeVar("Arguments", bound="TrainingArguments")


@dataclass
class TrainingArguments:
    """What every training script takes. Sentinels are said in the help: None = what the help says instead."""

    # The metric of an evaluation by which the best checkpoint is kept. None: the last is the best.
    best_metric: ClassVar[str | None] = None
    # What that metric is of: when one of these has changed, earlier values of it cannot be compared with later ones.
    judged_by: ClassVar[tuple[str, ...]] = ()
    # What the order of the data is of, beside the rows of a step: when one of these has changed, a place in it says
    # nothing. (Files and folders are not among them, for they may have been moved.)
    ordered_by: ClassVar[tuple[str, ...]] = ("seed", "tokens_per_step")
    # What the memory of a step is of, beside the model and the shapes of its rows.
    fills_memory: ClassVar[tuple[str, ...]] = ("zero", "sharding_backend", "auto_wrap", "muon", "fp16", "bf16")

    # The run and its folder
    model_name: str = field(metadata={"help": "Name of the run; its folder is output_dir/model_name."})
    output_dir: str = field(default="outputs", metadata={"help": "Folder that holds the runs."})
    resume: str = field(
        default="never",
        metadata={
            "help": "'auto' = go on from the run's newest whole checkpoint, or start where there is none; a "
            "checkpoint folder = go on from that, and delete later ones of the run with the next save; 'never' = "
            "start anew."
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Start anew although the run's folder is not empty: its checkpoints, curves, model and "
            "results are deleted. Without effect where the run goes on."
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of initial weights, order of data, masking and dropout."})

    # Batches. An optimizer step sees train_batch_size x gradient_accumulation_steps x processes rows.
    train_batch_size: int = field(
        default=32, metadata={"help": "Rows of one forward pass of one process. 0 = as many as fit into memory."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes in one optimizer step."})
    effective_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of an optimizer step over all processes; gradient_accumulation_steps follows from it. "
            "None = as many as train_batch_size and gradient_accumulation_steps make."
        },
    )
    memory_limit: str | None = field(
        default=None,
        metadata={
            "help": "What a process may use when train_batch_size is 0, such as 4GB. None = nine tenths of what is "
            "free."
        },
    )
    tokens_per_step: int | None = field(
        default=None,
        metadata={
            "help": "Cut steps by this many tokens, padding included and over all processes, not by rows. "
            "None = by rows."
        },
    )
    num_workers: int = field(default=1, metadata={"help": "Processes that prepare batches. 0 = the training process."})

    # Optimization
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decay of weights; none on biases and LayerNorms."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "Epsilon of AdamW."})
    muon: bool = field(
        default=False,
        metadata={
            "help": "Update the matrices of the encoder's layers by Muon, and the rest by AdamW. Not where fairscale "
            "shares out parameters."
        },
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "Clip the global gradient norm to this. 0 = never."})
    num_steps: int = field(default=10_000, metadata={"help": "Optimizer steps to train."})
    scheduler_num_steps: int | None = field(
        default=None,
        metadata={"help": "Step at which the learning rate would reach 0. Larger than num_steps: training stops "
                  "before that. None = num_steps."},
    )  # fmt: skip
    warmup_steps: int | None = field(
        default=None, metadata={"help": "Steps in which the learning rate rises from 0. None = by warmup_ratio."}
    )
    warmup_ratio: float = field(
        default=0.05,
        metadata={"help": "Share of the schedule in which the learning rate rises, unless warmup_steps says."},
    )
    decay_ratio: float = field(
        default=1.0,
        metadata={
            "help": "Share of the schedule in which the learning rate falls, at its end; until then it stays at its "
            "peak. 1 = it falls from the warm-up on."
        },
    )
    max_steps_per_epoch: int | None = field(
        default=None, metadata={"help": "End an epoch after this many steps. None = when the data is used up."}
    )
    fp16: bool = field(default=False, metadata={"help": "Matrix products in fp16, with a loss scale."})
    bf16: bool = field(default=False, metadata={"help": "Matrix products in bf16."})

    # Several processes
    zero: Literal[0, 1, 2, 3] = field(
        default=0,
        metadata={
            "help": "What the processes share out rather than each having it whole: 0 nothing, 1 moments, "
            "2 gradients too, 3 parameters too."
        },
    )
    zero3: bool = field(default=False, metadata={"help": "The same as zero 3."})
    sharding_backend: Literal["torch", "fairscale"] = field(
        default="torch", metadata={"help": "Whose sharding is used for zero 1 to 3."}
    )
    auto_wrap: bool = field(
        default=False,
        metadata={
            "help": "Full sharding (zero 3, and 2 with torch) gathers one block of layers at a time instead of the "
            "whole model; with fairscale, zero 2 becomes full sharding."
        },
    )

    timeout_minutes: float = field(
        default=30.0,
        metadata={
            "help": "How long a process waits for another one, which may be evaluating or saving, before it ends."
        },
    )

    # Watching and saving
    logging_steps: int = field(default=10, metadata={"help": "Steps between two points of the curves."})
    save_steps: int = field(default=1000, metadata={"help": "Steps between two checkpoints. 0 = only at the end."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints to keep; older ones are deleted."})
    eval_steps: int = field(default=0, metadata={"help": "Steps between two evaluations. 0 = only at the end."})
    max_minutes: float | None = field(
        default=None,
        metadata={
            "help": "Save and stop after this many minutes of training, with exit code 3 (under torchrun's "
            "restarts 0). Several seeds share them. None = no limit."
        },
    )

    # The Hub
    push_to_hub: bool = field(
        default=False,
        metadata={
            "help": "Push the finished model with a model card. The token is that of HF_TOKEN or of hf auth login. A "
            "push that fails leaves the model where it is, with exit code 5."
        },
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "USER/NAME of the repository. Required with push_to_hub."}
    )
    hub_private_repo: bool = field(default=False, metadata={"help": "Make it one that only you see."})
    hub_license: str = field(
        default="apache-2.0", metadata={"help": "Licence of the model for its card, as the Hub abbreviates it."}
    )
    hub_strategy: Literal["end", "every_save"] = field(
        default="end",
        metadata={"help": "When to push: at the end, or every checkpoint too, in the background of the training."},
    )

    def __post_init__(self):
        for name in ("gradient_accumulation_steps", "logging_steps", "save_total_limit"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("tokens_per_step", "max_steps_per_epoch", "effective_batch_size"):
            self.require(getattr(self, name) is None or getattr(self, name) >= 1, name, "at least 1")
        for name in ("train_batch_size", "num_workers", "max_grad_norm", "warmup_steps", "save_steps", "eval_steps"):
            self.require(getattr(self, name) is None or getattr(self, name) >= 0, name, "at least 0")
        self.require(0 <= self.warmup_ratio < 1, "warmup_ratio", "at least 0 and below 1")
        self.require(0 < self.decay_ratio <= 1, "decay_ratio", "above 0 and at most 1")
        self.require(0 <= self.weight_decay < math.inf, "weight_decay", "at least 0 and finite")
        for name in ("learning_rate", "adam_epsilon"):
            self.require(getattr(self, name) is None or 0 < getattr(self, name) < math.inf, name, "above 0 and finite")
        self.require(0 <= self.seed < 2**32, "seed", "from 0 to 4294967295")
        if self.num_steps is not None:
            self.fit_schedule()
        self.require(not (self.fp16 and self.bf16), "fp16", "off when bf16 is on")
        self.require(
            self.train_batch_size > 0 or self.tokens_per_step is None,
            "train_batch_size",
            "above 0 with tokens_per_step",
        )
        if self.effective_batch_size is not None:
            self.require(self.tokens_per_step is None, "tokens_per_step", "left out with effective_batch_size")
            follows = self.gradient_accumulation_steps == 1
            self.require(follows, "gradient_accumulation_steps", "left out with effective_batch_size")
        if self.memory_limit is not None:
            self.require(self.train_batch_size == 0, "memory_limit", "left out unless train_batch_size is 0")
            parse_memory("--memory_limit", self.memory_limit)
        self.require(0 < self.timeout_minutes <= 1e6, "timeout_minutes", "above 0 and at most a million")
        self.require(self.max_minutes is None or self.max_minutes > 0, "max_minutes", "above 0")
        if self.zero3:
            self.require(self.zero in (0, 3), "zero", "3 (or left out) with zero3")
            self.zero = 3
        self.require(
            not self.muon or has_matrices(self.zero, self.sharding_backend, self.auto_wrap),
            "muon",
            "left out where fairscale shares out parameters (zero 3, 2 with auto_wrap); --sharding_backend torch can",
        )
        if self.model_name is not None:
            named_well = self.model_name not in ("", ".", "..") and not set(self.model_name) & set("/\\")
            self.require(named_well, "model_name", "a plain folder name, without slashes")
        if self.push_to_hub and self.hub_model_id is None:
            raise UserError("--push_to_hub: --hub_model_id USER/NAME is missing")
        if self.hub_model_id is not None:
            require_repository_name(self.hub_model_id, "--hub_model_id")
        of_a_push = ("hub_model_id", "hub_private_repo", "hub_license", "hub_strategy")
        self.require_use(self.push_to_hub, of_a_push, "left out without push_to_hub")

    def require(self, allowed: bool, name: str, rule: str) -> None:
        """Raise UserError unless the field's value is allowed."""
        if not allowed:
            raise UserError(f"--{name}={getattr(self, name)!r}: must be {rule}")

    def require_use(self, has_use: bool, names: Iterable[str], rule: str) -> None:
        """Raise UserError where one of the fields would do nothing, and is not left as it is by default."""
        for name in names:
            is_default = getattr(self, name) == type(self).__dataclass_fields__[name].default
            self.require(has_use or is_default, name, rule)

    def fit_schedule(self) -> None:
        """Set scheduler_num_steps and warmup_steps, where they are to follow from num_steps.

        Raises:
            UserError: the steps of training, warm-up and schedule do not fit together.
        """
        if self.scheduler_num_steps is None:
            self.scheduler_num_steps = self.num_steps
        if self.warmup_steps is None:
            self.warmup_steps = int(self.warmup_ratio * self.scheduler_num_steps)
        self.require(self.num_steps >= 1, "num_steps", "at least 1")
        enough = f"at least num_steps={self.num_steps}"
        self.require(self.scheduler_num_steps >= self.num_steps, "scheduler_num_steps", enough)
        within = f"below the {self.scheduler_num_steps} steps of the schedule"
        self.require(self.warmup_steps < self.scheduler_num_steps, "warmup_steps", within)

    def fit_effective_batch(self, processes: int) -> None:
        """Make gradient_accumulation_steps what effective_batch_size asks for, unless train_batch_size is to be found.

        Raises:
            UserError: a step cannot be cut into equal batches of train_batch_size rows (of one, if it is to be found).
        """
        if self.effective_batch_size is None:
            return
        rows = max(1, self.train_batch_size) * processes
        factors = "processes" if self.train_batch_size == 0 else "train_batch_size x processes"
        is_multiple = self.effective_batch_size % rows == 0
        self.require(is_multiple, "effective_batch_size", f"a multiple of {factors} = {rows}")
        if self.train_batch_size > 0:
            self.gradient_accumulation_steps = self.effective_batch_size // rows

    def take_batch_size(self, fitting: int, rows_per_process: int | None) -> None:
        """Set a train_batch_size that was to be found.

        Args:
            fitting: the most rows for which there is memory.
            rows_per_process: of a step, which are cut into the fewest equal batches; None leaves
                gradient_accumulation_steps as it is.
        """
        self.train_batch_size = fitting
        if rows_per_process is not None:
            sizes = range(1, min(fitting, rows_per_process) + 1)
            self.train_batch_size = max(size for size in sizes if rows_per_process % size == 0)
            self.gradient_accumulation_steps = rows_per_process // self.train_batch_size

    @property
    def precision(self) -> str:
        """What matrix products are computed in: "fp32", "fp16" or "bf16"."""
        return "fp16" if self.fp16 else "bf16" if self.bf16 else "fp32"

    def take_precision(self, asked: str) -> None:
        """Compute in what the launcher asks for ("fp16", "bf16" or "no"), unless the arguments name a precision."""
        if self.precision == "fp32" and asked in ("fp16", "bf16"):
            setattr(self, asked, True)

    @property
    def run_folder(self) -> Path:
        """output_dir/model_name: checkpoints, curves, results and at the end the model."""
        return Path(self.output_dir) / (self.model_name or "")

    def data_sources(self) -> dict[str, list[Path] | str]:
        """What the run reads, by argument: files, or the name of a dataset on the Hub.

        Raises:
            UserError: there are no such files.
        """
        return {}

    def to_dict(self) -> dict[str, Any]:
        """The resolved arguments, as saved beside every checkpoint."""
        return dataclasses.asdict(self)


def cuts_parameters(zero: int, sharding_backend: str, auto_wrap: bool) -> bool:
    """Whether an engine cuts every parameter into as many pieces as there are ranks: from stage 2 on, but that
    fairscale's stage 2 without `auto_wrap` gives each parameter to one rank."""
    return zero == 3 or (zero == 2 and (auto_wrap or sharding_backend == "torch"))


def has_matrices(zero: int, sharding_backend: str, auto_wrap: bool) -> bool:
    """Whether an engine has the whole matrices that Muon updates: where fairscale cuts parameters, none has."""
    return sharding_backend == "torch" or not cuts_parameters(zero, sharding_backend, auto_wrap)


def with_default(of: type, name: str, default: Any) -> Any:
    """A dataclass's field for a class below it, with another default and the same help."""
    return field(default=default, metadata=of.__dataclass_fields__[name].metadata)


@dataclass
class PretrainingArguments(TrainingArguments):
    """What `run_pretraining.py` takes beside that."""

    ordered_by: ClassVar[tuple[str, ...]] = (*TrainingArguments.ordered_by, "task", "max_seq_length", "eval_split")
    fills_memory: ClassVar[tuple[str, ...]] = (*TrainingArguments.fills_memory, "mlm_probability")

    # With masking and warmup_ratio, the best that was tried with AdamW: docs/experiments.md
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate. None = 1e-3, or with muon 2e-3, up to a hidden size of 256, and beyond in "
            "inverse proportion to it."
        },
    )
    decay_ratio: float = with_default(TrainingArguments, "decay_ratio", 0.2)

    # Text: a corpus of .dat files, or a dataset
    corpus_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or file of .dat, .dat.xz, .dat.gz: a sentence a line, a blank line between documents."
        },
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Instead: a `datasets` name or a local dataset; each row is a document."}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset, where it has several."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the dataset that holds the text."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Tokenize the dataset as it is read, and keep no other copy of it on this machine's disk."},
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where the tokenized corpus is kept. None = MIXLM_CACHE or ~/.cache/mixlm."}
    )
    eval_split: float = field(default=0.01, metadata={"help": "Share of the documents held out for evaluation."})
    max_eval_examples: int = field(default=1000, metadata={"help": "Evaluate on at most this many held-out blocks."})

    # Model
    tokenizer: str | None = field(default=None, metadata={"help": "Folder or Hub name of a fast tokenizer. Required."})
    family: Literal["mixlm", "switch"] = field(default="mixlm", metadata={"help": "Encoder family."})
    preset: str | None = field(
        default=None,
        metadata={
            "help": "A preset's name; its vocabulary becomes the tokenizer's. None = mixlm-mini, or mixlm-switch-mini "
            "with family switch."
        },
    )
    config_file: str | None = field(default=None, metadata={"help": "Instead of a preset: a JSON configuration."})

    # Objective
    task: Literal["SOP", "ICT"] = field(default="SOP", metadata={"help": "What is learned beside masked tokens."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens of an example, special ones included."})
    mlm_probability: float = field(default=0.4, metadata={"help": "Share of the tokens that are to be predicted."})
    masking: Literal["subword", "word", "ngram"] = field(
        default="word", metadata={"help": "What is masked as one: a token, a whole word, or 1 to 3 words."}
    )
    remove_query_probability: float = field(
        default=0.9, metadata={"help": "ICT: how often the query is removed from its block."}
    )

    def __post_init__(self):
        super().__post_init__()
        if (self.corpus_path is None) == (self.dataset_name is None):
            raise UserError("give either --corpus_path (a folder or file of .dat) or --dataset_name")
        for name in ("dataset_config_name", "streaming"):
            self.require(
                not getattr(self, name) or self.dataset_name is not None, name, "left out without dataset_name"
            )
        if self.tokenizer is None:
            raise UserError("--tokenizer is missing; make one with: mixlm tokenizer train --corpus_path ... --out DIR")
        if self.preset is not None and self.config_file is not None:
            raise UserError(f"--preset={self.preset} and --config_file={self.config_file}: give one of them")
        if self.preset is None and self.config_file is None:
            self.preset = "mixlm-mini" if self.family == "mixlm" else "mixlm-switch-mini"
        self.require(0 < self.mlm_probability < 1, "mlm_probability", "between 0 and 1")
        self.require(0 <= self.remove_query_probability <= 1, "remove_query_probability", "from 0 to 1")
        self.require(0 < self.eval_split < 1, "eval_split", "between 0 and 1")
        self.require(self.max_eval_examples >= 1, "max_eval_examples", "at least 1")
        self.require(self.max_seq_length >= 8, "max_seq_length", "at least 8")

    def fit_learning_rate(self, hidden_size: int) -> None:
        """Set learning_rate, where it is to follow from the model's width.

        Of the rates tried at a width of 256, from 5e-4 to 2e-3, none was better than 1e-3, and with Muon, from 1e-3 to
        4e-3, none better than 2e-3 (docs/experiments.md). Adam's best rate for matrices is in inverse proportion to
        their width (Yang et al. 2022, "Tensor Programs V", table 3); here that is simplified to one rate for all
        parameters, and taken for Muon too, which was measured at that width alone.
        """
        if self.learning_rate is None:
            self.learning_rate = (2e-3 if self.muon else 1e-3) * min(1.0, 256 / hidden_size)

    def data_sources(self) -> dict[str, list[Path] | str]:
        if self.dataset_name is not None:
            return {"dataset_name": dataset_source(self.dataset_name)}
        return {"corpus_path": corpus_files(self.corpus_path)}


def dataset_source(name: str) -> list[Path] | str:
    """The files of a local dataset, or the name of one on the Hub."""
    path = Path(name)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.is_file() else name


class _Parser(HfArgumentParser):
    """argparse reports a mistake in several lines and exits; here it is a UserError."""

    def error(self, message: str):
        raise UserError(message)


def parse_arguments(arguments_class: type[Arguments], argv: list[str] | None = None) -> Arguments:
    """The arguments from `--name value ...`, or from one `.json` file.

    Raises:
        UserError: an unknown name (with the nearest known one), a value of the wrong type or one that is not allowed.
    """
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) == 1 and argv[0].endswith(".json"):
        return _from_json(arguments_class, Path(argv[0]))
    if argv and argv[0].endswith(".json"):
        raise UserError(f"{argv[0]}: a file of arguments stands alone; write {argv[1]} into it")
    parser = _Parser(arguments_class, allow_abbrev=False)
    # Looked at before parsing: argparse would first complain that the misspelled argument is missing.
    flags = [argument.partition("=")[0] for argument in argv if argument.startswith("--")]
    unknown = [flag for flag in flags if flag not in parser._option_string_actions]
    if not unknown:
        arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}{_nearest(unknown[0].lstrip('-'), arguments_class, '--')}")
    given = {name: value for name, value in vars(arguments).items() if name in _fields(arguments_class)}
    return arguments_class(**given)


def _from_json(arguments_class: type[Arguments], path: Path) -> Arguments:
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, lists in lists in lists
        raise UserError(f"{path}: not a JSON file: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a JSON {type(values).__name__}, expected an object of arguments")
    types = typing.get_type_hints(arguments_class)
    for name, value in values.items():
        if name not in _fields(arguments_class):
            raise UserError(f"{path}: unknown field {name!r}{_nearest(name, arguments_class, '')}")
        if not _has_type(value, types[name]):
            raise UserError(f"{path}: field {name!r} is {json.dumps(value)}, expected {_describe(types[name])}")
    required = [f.name for f in dataclasses.fields(arguments_class) if f.default is dataclasses.MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise UserError(f"{path}: field {missing[0]!r} is missing")
    # As on the command line, where 1 for a number is 1.0.
    floats = [name for name, value in values.items() if value is not None and types[name] in (float, float | None)]
    return arguments_class(**values | {name: float(values[name]) for name in floats})


def _fields(arguments_class: type) -> list[str]:
    return [f.name for f in dataclasses.fields(arguments_class)]


def _nearest(name: str, arguments_class: type, dashes: str) -> str:
    close = difflib.get_close_matches(name, _fields(arguments_class), n=1)
    return f"; did you mean {dashes}{close[0]}?" if close else "; --help lists them"


def _has_type(value: Any, annotation: Any) -> bool:
    if get_origin(annotation) is list:
        return isinstance(value, list) and all(_has_type(each, *get_args(annotation)) for each in value)
    if get_origin(annotation) is Literal:
        return any(type(value) is type(allowed) and value == allowed for allowed in get_args(annotation))
    if get_args(annotation):  # a union
        return any(_has_type(value, part) for part in get_args(annotation))
    if annotation is float and isinstance(value, int):  # of hundreds of digits, it cannot be one
        return not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _describe(annotation: Any) -> str:
    if get_origin(annotation) is list:
        return f"a list of {_describe(*get_args(annotation))}"
    if get_origin(annotation) is Literal:
        return " or ".join(map(repr, get_args(annotation)))
    if get_args(annotation):
        return " or ".join(_describe(part) for part in get_args(annotation))
    return {"NoneType": "null", "str": "text", "bool": "true or false"}.get(annotation.__name__, annotation.__name__)
