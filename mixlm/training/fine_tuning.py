"""What fine-tuning scripts share: arguments that follow from the data, and questions out of SQuAD-style files."""

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from accelerate import Accelerator

from ..data.corpus import dataset_name, load_splits
from ..data.squad import (
    ReadingData,
    ReadingExample,
    SkippedAnswer,
    count_unanswerable,
    read_rows,
    read_squad,
    reading_files,
    select_articles,
    split_by_article,
)
from ..errors import UserError
from ..files import write_json
from .arguments import TrainingArguments, dataset_source, with_default
from .run import SKIPPED_FILE, build_accelerator, on_main_process

if TYPE_CHECKING:
    from ..data.corpus import AnyDataset


@dataclass
class FineTuningArguments(TrainingArguments):
    """What every fine-tuning script takes beside that."""

    ordered_by: ClassVar[tuple[str, ...]] = (
        *(*TrainingArguments.ordered_by, "train_articles", "validation_articles", "validation_split"),
    )

    # Not as in pretraining
    model_name: str | None = field(
        default=None, metadata={"help": "Name of the run; its folder is output_dir/model_name. None = output_dir."}
    )
    learning_rate: float = with_default(TrainingArguments, "learning_rate", 5e-5)
    num_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps to train. None = by num_train_epochs."}
    )
    warmup_ratio: float = with_default(TrainingArguments, "warmup_ratio", 0.1)
    num_train_epochs: float = field(default=3.0, metadata={"help": "How often to go through the data."})
    eval_steps: int | None = field(
        default=None,
        metadata={"help": "Steps between two evaluations. 0 = only at the end. None = once an epoch."},
    )
    seeds: list[int] | None = field(
        default=None,
        metadata={"help": "Train once for each of these seeds, in output_dir/seed-N, and report mean and deviation."},
    )

    # Model and data
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of a pretrained model of any head. Required."}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Folder or Hub name. None = the model's."})
    train_file: list[str] | None = field(
        default=None,
        metadata={"help": "SQuAD-style .json, or .jsonl with SQuAD's columns, also .gz or .xz; files or folders."},
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "As train_file. None = articles of train_file that are not trained on."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Instead of files: a `datasets` name with SQuAD's columns."}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset, where it has several."}
    )
    train_articles: str | None = field(
        default=None, metadata={"help": "Train on these articles of train_file alone, such as 0:110."}
    )
    validation_articles: str | None = field(
        default=None, metadata={"help": "Evaluate on these articles, such as 110:140."}
    )
    validation_split: float = field(
        default=0.1, metadata={"help": "Share of the articles to evaluate on, where nothing else says which."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.model_name_or_path is None:
            raise UserError("--model_name_or_path is missing; give a pretrained model's folder or Hub name")
        if self.dataset_name is not None and self.train_file is not None:
            raise UserError(f"--train_file and --dataset_name={self.dataset_name}: give one of them")
        is_named = self.dataset_config_name is None or self.dataset_name is not None
        self.require(is_named, "dataset_config_name", "left out without dataset_name")
        self.require(0 < self.num_train_epochs <= 1e6, "num_train_epochs", "above 0 and at most a million")
        self.require(0 < self.validation_split < 1, "validation_split", "between 0 and 1")
        self.require(self.tokens_per_step is None, "tokens_per_step", "left out: the number of steps depends on rows")
        says_when = self.num_steps is not None and self.eval_steps is not None
        is_known = self.train_batch_size > 0 or self.effective_batch_size is not None or says_when
        rule = "above 0, unless effective_batch_size, or num_steps and eval_steps, are given"
        self.require(is_known, "train_batch_size", rule)
        if self.seeds is not None:
            are_seeds = all(0 <= seed < 2**32 for seed in self.seeds)
            are_distinct = len(set(self.seeds)) == len(self.seeds) > 0
            self.require(are_seeds and are_distinct, "seeds", "one or more different numbers from 0 to 4294967295")
            self.require(self.resume in ("auto", "never"), "resume", "auto or never with seeds")
            rule = "left out with seeds: push one of them afterwards with mixlm push"
            self.require(not self.push_to_hub, "push_to_hub", rule)

    def data_sources(self) -> dict[str, list[Path] | str]:
        sources: dict[str, list[Path] | str] = {}
        if self.dataset_name is not None:
            sources["dataset_name"] = dataset_source(self.dataset_name)
        for argument in ("train_file", "validation_file"):
            if (given := getattr(self, argument)) is not None:
                sources[argument] = [file for path in given for file in reading_files(path)]
        return sources

    def fit_steps(self, rows_of_an_epoch: int, processes: int) -> None:
        """Set num_steps, eval_steps and the schedule, where they are to follow from the data.

        Args:
            rows_of_an_epoch: how many there are to train on.
            processes: that share a step.
        """
        rows = self.effective_batch_size or self.train_batch_size * self.gradient_accumulation_steps * processes
        if rows:  # otherwise it is said when to end, and when to evaluate
            steps_per_epoch = max(1, rows_of_an_epoch // rows)
            if self.max_steps_per_epoch is not None:
                steps_per_epoch = min(steps_per_epoch, self.max_steps_per_epoch)
        if self.num_steps is None:
            self.num_steps = max(1, round(self.num_train_epochs * steps_per_epoch))
        if self.eval_steps is None:
            self.eval_steps = steps_per_epoch
        self.fit_schedule()


@dataclass(frozen=True)
class Questions:
    """What a run trains and is evaluated on.

    Args:
        training, validation: questions; none in common.
        everything: all questions that were read, also those of other articles and those without an answer.
        skipped: answers that cannot be learned from.
        notes: lines that the user should see.
    """

    training: list[ReadingExample]
    validation: list[ReadingExample]
    everything: list[ReadingExample]
    skipped: list[SkippedAnswer]
    notes: list[str]


def read_questions(
    arguments: FineTuningArguments,
    unanswerable_flag: str,
    is_training: bool = True,
    dataset: "AnyDataset | None" = None,
) -> Questions:
    """The questions that the arguments name.

    Validation questions are those of `validation_file`, or of the dataset's split of that name, or else articles of
    the training data that are not trained on.

    Args:
        arguments: of the run.
        unanswerable_flag: the argument without which unanswerable questions are left out.
        is_training: whether there must be some to train on.
        dataset: what `datasets` has loaded, a stream or not, instead of what the arguments name.

    Raises:
        UserError: a file is wrong; a range of articles is empty; what is evaluated on is trained on; nothing can be
            learned from.
    """
    data, held_out = None, None
    dataset = arguments.dataset_name if dataset is None else dataset
    if dataset is not None:
        splits, name = load_splits(dataset, arguments.dataset_config_name), dataset_name(dataset)
        data = read_rows(splits["train"], name) if "train" in splits else None
        held_out = read_rows(splits["validation"], name) if "validation" in splits else None
    if arguments.train_file is not None:
        data = read_squad(arguments.train_file)
    if arguments.validation_file is not None:
        held_out = read_squad(arguments.validation_file)
    parts = [part for part in (data, held_out) if part is not None]
    notes = [note for part in parts for note in _notes(part)]
    training = [] if data is None else data.examples
    if held_out is not None:
        validation = held_out.examples
        if arguments.validation_articles is not None:
            validation = select_articles(validation, arguments.validation_articles)
        if arguments.train_articles is not None:
            training = select_articles(training, arguments.train_articles)
        if is_training:
            notes += _notes_of_common_texts(training, validation)
    else:
        training, validation = _split(training, arguments)
    advice = "choose others"
    if not getattr(arguments, unanswerable_flag) and (unanswerable := count_unanswerable(training + validation)):
        advice = f"is --{unanswerable_flag} missing?"
        notes.append(f"{unanswerable:,} questions have no answer and are left out; --{unanswerable_flag} uses them")
        training, validation = ([each for each in part if not each.is_impossible] for part in (training, validation))
    for name, is_lacking in (("train", is_training and not training), ("evaluate", not validation)):
        if is_lacking:
            raise UserError(f"no question to {name} on is left; {advice}")
    everything = [each for part in parts for each in part.examples]
    return Questions(training, validation, everything, [each for part in parts for each in part.skipped], notes)


def _notes_of_common_texts(training: list[ReadingExample], validation: list[ReadingExample]) -> list[str]:
    """What is to be said where texts are in both; that the same is asked about them is an error."""
    asked = {(example.context, example.question) for example in training}
    if common := [example.id for example in validation if (example.context, example.question) in asked]:
        raise UserError(
            f"{len(common):,} of the questions to evaluate on, such as '{common[0]}', are trained on; what is trained "
            "on says nothing in an evaluation"
        )
    contexts = {context for context, _ in asked}
    if common := [example.id for example in validation if example.context in contexts]:
        return [
            f"{len(common):,} questions to evaluate on, such as '{common[0]}', are about texts that are trained on, "
            "with other questions"
        ]
    return []


def _split(
    examples: list[ReadingExample], arguments: FineTuningArguments
) -> tuple[list[ReadingExample], list[ReadingExample]]:
    """Training and validation articles of one data set."""
    chosen, held_out = arguments.train_articles, arguments.validation_articles
    if held_out is None:
        return split_by_article(
            examples if chosen is None else select_articles(examples, chosen), arguments.validation_split, seed=0
        )
    validation = select_articles(examples, held_out)
    articles = {example.article for example in validation}
    if chosen is None:
        return [example for example in examples if example.article not in articles], validation
    training = select_articles(examples, chosen)
    if common := sorted(articles & {example.article for example in training}):
        raise UserError(
            f"--train_articles={chosen} and --validation_articles={held_out}: article {common[0]} is in both; what is "
            "trained on says nothing in an evaluation"
        )
    return training, validation


def _notes(data: ReadingData) -> list[str]:
    notes = []
    if data.repaired_answers:
        notes.append(f"answers that stood elsewhere in their context than the file says: {data.repaired_answers:,}")
    if data.skipped:
        notes.append(
            f"answers that are not where the file says, nor once nearby: {len(data.skipped):,}, see {SKIPPED_FILE}"
        )
    return notes


def run_seeds(run: Callable[[Any], dict[str, float]], arguments: FineTuningArguments) -> None:
    """A run for each seed, in a folder of its own; mean and deviation of their metrics are in seeds.json.

    They share `max_minutes`: the time that is left when one has ended is the next one's.

    Args:
        run: makes a run and returns its metrics.
        arguments: of all of them, but for seed and folder.
    """
    found, begun_at = [], time.monotonic()
    for seed in arguments.seeds:
        own = copy.deepcopy(arguments)
        if own.max_minutes is not None:
            own.max_minutes = max(0.0, own.max_minutes - (time.monotonic() - begun_at) / 60)
        own.seed, own.output_dir, own.model_name = seed, str(arguments.run_folder), f"seed-{seed}"
        found.append(run(own))

    def summarize() -> None:
        summary = {}
        for name in found[0]:
            values = [metrics[name] for metrics in found]
            mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
            summary[name] = {"mean": mean, "deviation": deviation, "values": values}
            print(f"  {name:>29}  {mean:,.2f} ± {deviation:.2f}")
        write_json(arguments.run_folder / "seeds.json", summary)

    on_main_process(build_accelerator(arguments), summarize)


def write_skipped(skipped: Iterable[SkippedAnswer], arguments: FineTuningArguments, accelerator: Accelerator) -> None:
    """Write what cannot be learned from into the run's folder."""

    def write() -> None:
        arguments.run_folder.mkdir(parents=True, exist_ok=True)
        write_lines(arguments.run_folder / SKIPPED_FILE, map(asdict, skipped))

    on_main_process(accelerator, write)


def write_lines(file: Path, objects: Iterable[dict]) -> None:
    """Write JSON lines."""
    file.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in objects), "utf-8")
