#!/usr/bin/env python
"""Fine-tune an encoder for machine reading on SQuAD-style data, evaluate it, and answer questions.

    python run_mrc.py --model_name_or_path MODEL --train_file KorQuAD_v1.0_train.json --output_dir my-reader

or with `accelerate launch` or `torchrun` on several processes, or `python run_mrc.py arguments.json`. Without
`--validation_file` some articles of the training file are held out (`--validation_articles`, `--validation_split`).
"""

import copy
import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerFast
from transformers.utils.logging import set_verbosity_error

import mixlm  # noqa: F401  whose models the Auto classes know from now on
from mixlm.data.batching import LengthBucketedBatches, collate, training_batches
from mixlm.data.reading import Predictions, predictions_of
from mixlm.data.squad import ReadingExample, read_squad
from mixlm.errors import UserError, exits_on_user_error
from mixlm.reader import Decoding
from mixlm.tokenization import load_tokenizer
from mixlm.training.arguments import parse_arguments
from mixlm.training.loop import train
from mixlm.training.objectives import ReadingObjective
from mixlm.training.optimization import AdamW
from mixlm.training.reading import (
    Questions,
    ReadingArguments,
    chosen_metric,
    decoding_of,
    read_questions,
    reading_metrics,
    tuned,
    window_scores,
    write_predictions,
)
from mixlm.training.run import SKIPPED_FILE, finish_run, on_main_process, prepare_run
from mixlm.training.sharding import Engine, build_engine

EVALUATION_ROWS = 32  # of a batch, where no training has said how many fit


def load_model(name_or_path: str, accelerator: Accelerator):
    """A model for question answering; where the pretrained one has no such head, with a new one."""
    set_verbosity_error()  # what it would warn of is said below, in a line
    try:
        model, report = AutoModelForQuestionAnswering.from_pretrained(name_or_path, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name_or_path {name_or_path}: cannot be loaded: {error}") from error
    missing = sorted(report["missing_keys"])
    if other := [name for name in missing if not name.startswith("qa_outputs.")]:
        raise UserError(f"--model_name_or_path {name_or_path}: lacks {other[0]} and {len(other) - 1} more weights")
    if missing:
        accelerator.print(f"{name_or_path} has no head for question answering: a new one is trained")
    return model


def train_reader(
    arguments: ReadingArguments, accelerator: Accelerator, questions: Questions, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Train, and leave the model of the best checkpoint in the run's folder."""
    decoding, metric = decoding_of(arguments), chosen_metric(arguments, questions.validation)
    model = load_model(arguments.model_name_or_path, accelerator)
    if arguments.max_seq_length > model.config.max_position_embeddings:
        raise UserError(
            f"--max_seq_length={arguments.max_seq_length}: {arguments.model_name_or_path} takes at most "
            f"{model.config.max_position_embeddings} tokens (max_position_embeddings); use that or less"
        )
    training = decoding.windows(questions.training, tokenizer, training=True)
    held_out = decoding.windows(questions.validation, tokenizer)
    ranks, rank = accelerator.num_processes, accelerator.process_index
    arguments.fit_schedule(len(training), ranks)
    accelerator.print(
        f"{len(questions.training):,} questions in {len(training):,} windows to train on for {arguments.num_steps:,} "
        f"steps, {len(questions.validation):,} in {len(held_out):,} to evaluate on; {training.cut_questions:,} "
        "questions were longer than max_query_length and cut"
    )
    skipped = [*questions.skipped, *training.skipped]
    on_main_process(accelerator, lambda: write_lines(arguments.run_folder / SKIPPED_FILE, map(asdict, skipped)))

    def evaluate(engine: Engine) -> dict[str, float]:
        scores = window_scores(engine, held_out, arguments.train_batch_size, tokenizer.pad_token_id, accelerator)
        predictions = predictions_of(held_out, decoding.read(held_out, scores))
        return reading_metrics(predictions, questions.validation, metric, decoding)

    def batches(position):
        micro_batches = arguments.gradient_accumulation_steps
        order = LengthBucketedBatches(
            training.lengths,
            seed=arguments.seed,
            rows_per_step=arguments.train_batch_size * micro_batches * ranks,
            ranks=ranks,
            rank=rank,
            micro_batches=micro_batches,
            max_steps_per_epoch=arguments.max_steps_per_epoch,
        )
        return training_batches(training, order, position, tokenizer.pad_token_id, arguments.num_workers)

    def longest_batch(rows):
        longest = training[0, int(np.argmax(training.lengths))]
        return collate([longest] * rows, tokenizer.pad_token_id)

    best = train(model, ReadingObjective, batches, arguments, accelerator, evaluate, longest_batch)
    finish_run(tokenizer, best, arguments, accelerator)
    on_main_process(accelerator, lambda: tuned(decoding, best.metrics).save(arguments.run_folder))


def read_with(
    folder: str, examples: list[ReadingExample], arguments: ReadingArguments, accelerator: Accelerator
) -> Predictions:
    """The answers of a trained model, decoded as it was tuned."""
    tokenizer, decoding = load_tokenizer(folder), Decoding.load(Path(folder)) or decoding_of(arguments)
    model = load_model(folder, accelerator).to(accelerator.device)
    adamw = AdamW(arguments.learning_rate, arguments.weight_decay, arguments.adam_epsilon)
    engine = build_engine(model, adamw, arguments.precision, zero=0, backend="torch", units=[])
    engine.eval()
    windows = decoding.windows(examples, tokenizer)
    rows = arguments.train_batch_size or EVALUATION_ROWS
    scores = window_scores(engine, windows, rows, tokenizer.pad_token_id, accelerator)
    return predictions_of(windows, decoding.read(windows, scores))


def write_lines(file: Path, objects: Iterable[dict]) -> None:
    """Write JSON lines."""
    file.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in objects), "utf-8")


def write_summary(file: Path, runs: list[dict[str, float]]) -> None:
    """Show and write mean and deviation of each metric over runs with different seeds."""
    summary = {}
    for name in runs[0]:
        values = [metrics[name] for metrics in runs]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        summary[name] = {"mean": statistics.mean(values), "deviation": deviation, "values": values}
        print(f"  {name:>28}  {summary[name]['mean']:,.2f} ± {deviation:.2f}")
    file.write_text(json.dumps(summary, indent=2) + "\n", "utf-8")


def run(arguments: ReadingArguments) -> dict[str, float]:
    """Train, evaluate and predict, as far as is asked for; returns the metrics of the evaluation, if there is one."""
    folder = arguments.run_folder
    accelerator = prepare_run(arguments) if arguments.do_train else Accelerator(cpu=not torch.cuda.is_available())
    model, metrics = arguments.model_name_or_path, {}
    if arguments.do_train or arguments.do_eval:
        questions = read_questions(arguments)
        for note in questions.notes:
            accelerator.print(note)
    if arguments.do_train:
        tokenizer = load_tokenizer(arguments.tokenizer or arguments.model_name_or_path)
        train_reader(arguments, accelerator, questions, tokenizer)
        model = str(folder)
    if arguments.do_eval:
        predictions = read_with(model, questions.validation, arguments, accelerator)
        metric = chosen_metric(arguments, questions.validation)
        decoding = Decoding.load(Path(model)) or decoding_of(arguments)
        metrics = reading_metrics(predictions, questions.validation, metric, decoding)
        on_main_process(accelerator, lambda: write_predictions(predictions, folder, metrics))
        accelerator.print("".join(f"  {name:>28}  {value:,.2f}\n" for name, value in metrics.items()), end="")
    if arguments.do_predict:
        examples = read_squad(arguments.predict_file, to_learn_from=False).examples
        asked = read_with(model, examples, arguments, accelerator)
        on_main_process(accelerator, lambda: write_predictions(asked, folder / "predict"))
    accelerator.print(f"answers are in {folder}")
    accelerator.end_training()
    return metrics


@exits_on_user_error
def main():
    arguments = parse_arguments(ReadingArguments)
    if arguments.seeds is None:
        run(arguments)
        return
    found = []
    for seed in arguments.seeds:
        print(f"seed {seed}")
        own = copy.deepcopy(arguments)
        own.seed, own.model_name = seed, f"{arguments.model_name or ''}seed-{seed}"
        found.append(run(own))
    write_summary(arguments.run_folder / "seeds.json", found)


if __name__ == "__main__":
    main()
