"""Fine-tuning for machine reading: what `run_mrc.py` is told, the scores of all windows, and what they are worth."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..data.particles import require_kiwi
from ..data.reading import Predictions, ReadingWindows, predictions_of
from ..data.squad import ReadingExample
from ..errors import UserError
from ..evaluation.reading import (
    ANSWER_SCORES,
    korquad_v1,
    normalize_korquad,
    normalize_squad,
    score_squad_v2,
    squad_v1,
    squad_v2,
    usual_metric,
)
from ..evaluation.reading_errors import error_kind
from ..evaluation.reading_report import JudgedQuestion
from ..files import write_json
from ..reader import Decoding, MixLMReader, WindowScores, in_order, scores_by_window
from ..tokenization import answers_on_token_borders
from .fine_tuning import FineTuningArguments
from .run import say

METRICS = {"korquad_v1": korquad_v1, "squad_v1": squad_v1}
# What a run is told of its windows and answers, by the names of the fields of `Decoding`.
DECODING_ARGUMENTS = (
    *("max_seq_length", "doc_stride", "max_query_length", "n_best_size", "max_answer_length", "korean_particles"),
)
# What says how to train, and nothing else; num_steps is before those that follow from it.
TRAINING_ARGUMENTS = (
    *("push_to_hub", "seeds", "num_steps", "num_train_epochs", "max_steps_per_epoch", "scheduler_num_steps"),
    *("learning_rate", "warmup_steps", "warmup_ratio", "decay_ratio", "weight_decay", "adam_epsilon", "max_grad_norm"),
    *("muon", "gradient_accumulation_steps", "effective_batch_size", "eval_steps", "max_minutes", "fp16", "bf16"),
)
NORMALIZERS = {"korquad_v1": normalize_korquad, "squad_v1": normalize_squad}


@dataclass
class ReadingArguments(FineTuningArguments):
    """What `run_mrc.py` takes beside that."""

    best_metric: ClassVar[str | None] = "f1"
    judged_by: ClassVar[tuple[str, ...]] = (
        *("metric", "version_2_with_negative", "train_file", "dataset_name", "dataset_config_name", "train_articles"),
        *("validation_file", "validation_articles", "validation_split"),
        *DECODING_ARGUMENTS,
    )
    ordered_by: ClassVar[tuple[str, ...]] = (
        *(*FineTuningArguments.ordered_by, "version_2_with_negative"),
        *("max_seq_length", "doc_stride", "max_query_length"),
    )

    predict_file: list[str] | None = field(default=None, metadata={"help": "Questions to answer, as train_file."})
    version_2_with_negative: bool = field(
        default=False, metadata={"help": "Some questions have no answer, as in SQuAD 2.0."}
    )
    do_train: bool = field(
        default=False,
        metadata={"help": "Train. Without any of do_train, do_eval, do_predict: all that files are for."},
    )
    do_eval: bool = field(default=False, metadata={"help": "Evaluate the best checkpoint and write its predictions."})
    do_predict: bool = field(default=False, metadata={"help": "Answer the questions of predict_file."})

    # Windows and answers
    max_seq_length: int = field(
        default=Decoding.max_seq_length, metadata={"help": "Tokens of a window: question, context, special ones."}
    )
    doc_stride: int = field(
        default=Decoding.doc_stride, metadata={"help": "Tokens from the beginning of a window to the next."}
    )
    max_query_length: int = field(
        default=Decoding.max_query_length, metadata={"help": "Tokens of a question; a longer one is cut."}
    )
    n_best_size: int = field(
        default=Decoding.n_best_size, metadata={"help": "Candidates of a question in nbest_predictions.json."}
    )
    max_answer_length: int = field(default=Decoding.max_answer_length, metadata={"help": "Tokens of an answer."})
    korean_particles: bool = field(
        default=False,
        metadata={"help": "Drop particles (josa) from the end of answers: 학교에서 becomes 학교. Needs kiwipiepy."},
    )
    tune_decoding: bool = field(
        default=False,
        metadata={
            "help": "Evaluate the best checkpoint with and without korean_particles, and keep what has the higher F1: "
            "a little optimistic, because it is chosen where it is measured."
        },
    )
    metric: Literal["korquad_v1", "squad_v1"] | None = field(
        default=None,
        metadata={
            "help": "Whose EM and F1 choose the best checkpoint. None = KorQuAD's where most contexts are Korean, "
            "else SQuAD's; with version_2_with_negative always SQuAD 2.0's."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if not (self.dataset_name or self.train_file or self.validation_file or self.predict_file):
            raise UserError("no questions: give --train_file, --validation_file, --predict_file or --dataset_name")
        if not (self.do_train or self.do_eval or self.do_predict):
            self.do_train = bool(self.train_file or self.dataset_name)
            self.do_eval = self.do_train or self.validation_file is not None
            self.do_predict = self.predict_file is not None
        if self.do_train and not (self.train_file or self.dataset_name):
            raise UserError("--do_train: nothing to train on; give --train_file or --dataset_name")
        has_questions = self.predict_file is not None
        self.require(has_questions or not self.do_predict, "do_predict", "left out without predict_file")
        if self.version_2_with_negative:
            self.best_metric = "best_f1"
        for name in ("n_best_size", "max_answer_length"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        is_open = self.do_train and self.do_eval and not self.korean_particles
        rule = "left out, unless the run trains and evaluates, without korean_particles"
        self.require(is_open or not self.tune_decoding, "tune_decoding", rule)
        self.require_use(self.do_train, TRAINING_ARGUMENTS, "left out where nothing is trained")
        if self.korean_particles or self.tune_decoding:
            require_kiwi()


def window_scores(
    model: Callable[..., Any], windows: ReadingWindows, rows: int, pad_token_id: int, accelerator: Accelerator
) -> WindowScores:
    """The logits of all windows, on every rank.

    Args:
        model: a ForQuestionAnswering model or its engine, in evaluation mode.
        windows: all of them; the ranks share the work.
        rows: of a batch.
        pad_token_id: the padding token.
        accelerator: joins the ranks.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    own = list(scores_by_window(model, accelerator.device, windows, rows, pad_token_id, rank, ranks))
    return in_order(windows, gather_object(own))


def reading_metrics(
    predictions: Predictions, examples: Sequence[ReadingExample], metric: str, decoding: Decoding
) -> dict[str, float]:
    """What predictions are worth.

    Args:
        predictions: of these questions. With unanswerable ones, `predictions.predictions` has an answer or "".
        examples: the questions, with their references.
        metric: "korquad_v1" or "squad_v1": whose `exact_match` and `f1` are the run's; the other's have its name
            before them. With unanswerable questions they are SQuAD 2.0's, with parts and best thresholds.
        decoding: whether there are unanswerable questions.

    Returns:
        metrics by name, all numbers.
    """
    references = {example.id: list(example.answer_texts) for example in examples}
    if decoding.unanswerable:
        best_answers = {id_: best_answer(candidates) for id_, candidates in predictions.nbest_predictions.items()}
        scores = squad_v2(best_answers, references, predictions.null_odds, decoding.null_threshold)
        of_nothing = 100 * scores.get("NoAns_total", 0) / scores["total"]
        for best, threshold in (("best_f1", "best_f1_thresh"), ("best_exact", "best_exact_thresh")):
            if scores[best] == of_nothing and not scores[threshold]:
                # The official 0 of "it is best to answer nothing": below all odds, it is a threshold that says so.
                scores[threshold] = min(predictions.null_odds.values()) - 1
        return {"exact_match": scores.pop("exact"), **scores}
    other = next(name for name in METRICS if name != metric)
    scores = METRICS[metric](predictions.predictions, references)
    others = METRICS[other](predictions.predictions, references)
    return {**scores, **{f"{other}_{name}": others[name] for name in ("exact_match", "f1")}}


def judged_questions(
    predictions: Predictions, examples: Sequence[ReadingExample], metric: str, reader: MixLMReader
) -> list[JudgedQuestion]:
    """What each prediction is worth, and what makes its question easy or hard.

    Args:
        predictions: of these questions.
        examples: the questions, with their references.
        metric: as in `reading_metrics`.
        reader: that has answered them.
    """
    score, normalize = ANSWER_SCORES[metric], NORMALIZERS[metric]
    if reader.decoding.unanswerable:
        score, normalize = score_squad_v2, normalize_squad
    windows = np.bincount(reader.decoding.windows(examples, reader.tokenizer).example_of_window).tolist()
    expressible = answers_on_token_borders(
        reader.tokenizer, ((example.context, answer) for example in examples for answer in example.answers)
    )
    judged = []
    for example, window_count in zip(examples, windows, strict=True):
        answer, references = predictions.predictions[example.id], example.answer_texts
        exact_match, f1 = score(answer, references)
        judged.append(
            JudgedQuestion(
                id=example.id,
                question=example.question,
                references=list(references),
                prediction=answer,
                windows=window_count,
                expressible=not references or any((example.context, each) in expressible for each in example.answers),
                exact_match=exact_match,
                f1=f1,
                error=error_kind(answer, references, normalize),
            )
        )
    return judged


def best_answer(candidates: Sequence[Mapping[str, str | float]]) -> str:
    """The best candidate that is an answer; "" where there is none."""
    return next((candidate["text"] for candidate in candidates if candidate["text"]), "")


def read_over_ranks(reader: MixLMReader, examples: Sequence[ReadingExample], accelerator: Accelerator) -> Predictions:
    """The answers of a reader on the accelerator's device; the ranks share the work, and all get all answers."""
    windows, scores = scores_over_ranks(reader, examples, accelerator)
    return predictions_of(windows, reader.decoding.read(windows, scores))


def scores_over_ranks(
    reader: MixLMReader, examples: Sequence[ReadingExample], accelerator: Accelerator
) -> tuple[ReadingWindows, WindowScores]:
    """The windows of questions and what the reader thinks of them: what `Decoding.read` takes."""
    windows = reader.decoding.windows(examples, reader.tokenizer)
    if windows.cut_questions:
        say(accelerator, f"questions cut to max_query_length: {windows.cut_questions:,}")
    pad_token_id = reader.tokenizer.pad_token_id
    return windows, window_scores(reader.model, windows, reader.batch_size, pad_token_id, accelerator)


def tune_particles(
    reader: MixLMReader, examples: Sequence[ReadingExample], metric: str, accelerator: Accelerator
) -> tuple[Predictions, dict[str, float]]:
    """Let a reader drop particles if its F1 is higher so, and keep them if not.

    Its null threshold stays as it is, so that it is F1 with that threshold that counts.

    Args:
        reader: its decoding is changed.
        examples: to choose by.
        metric: as in `reading_metrics`.
        accelerator: joins the ranks; on all of them is the reader, which is changed in the same way.

    Returns:
        its answers and metrics as it is now, and `exact_match` and `f1` of both with `particles_kept_` and
        `particles_dropped_` before them.
    """
    windows, scores = scores_over_ranks(reader, examples, accelerator)
    trials = {}
    for name, drops in (("particles_kept", False), ("particles_dropped", True)):
        decoding = replace(reader.decoding, korean_particles=drops)
        predictions = predictions_of(windows, decoding.read(windows, scores))
        trials[name] = decoding, predictions, reading_metrics(predictions, examples, metric, decoding)
    compared = {
        f"{name}_{score}": metrics[score] for name, (*_, metrics) in trials.items() for score in ("exact_match", "f1")
    }
    # Of equals the first.
    reader.decoding, predictions, metrics = max(trials.values(), key=lambda trial: trial[-1]["f1"])
    return predictions, {**metrics, **compared}


def decoding_of(arguments: ReadingArguments) -> Decoding:
    """How the answers of a run come from scores, before its threshold is tuned."""
    told = {name: getattr(arguments, name) for name in DECODING_ARGUMENTS}
    return Decoding(**told, unanswerable=arguments.version_2_with_negative)


def changed_decoding(arguments: ReadingArguments) -> dict[str, int | bool]:
    """What a stored reader is to do in another way, by the field of its decoding: what is not said by default."""
    told = {name: getattr(arguments, name) for name in DECODING_ARGUMENTS}
    return {name: value for name, value in told.items() if value != getattr(ReadingArguments, name)}


def tuned(decoding: Decoding, metrics: Mapping[str, float]) -> Decoding:
    """With the null threshold that was best for F1 where `metrics` come from."""
    return replace(decoding, null_threshold=metrics["best_f1_thresh"]) if decoding.unanswerable else decoding


def chosen_metric(arguments: ReadingArguments, examples: Sequence[ReadingExample]) -> str:
    """The metric a run is judged by: see `ReadingArguments.metric`."""
    if arguments.metric is not None:
        return arguments.metric
    return usual_metric([example.context for example in examples])


def write_predictions(predictions: Predictions, folder: Path, metrics: Mapping[str, float] | None = None) -> None:
    """Write the files of the official scripts, predictions.json, nbest_predictions.json and, for SQuAD 2.0,
    null_odds.json; and eval_results.json, if there are metrics."""
    files = {name: content for name, content in asdict(predictions).items() if content or name != "null_odds"}
    if metrics is not None:
        files["eval_results"] = {f"eval/{name}": value for name, value in metrics.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)
