#!/usr/bin/env python
"""Fine-tune an encoder for machine reading on SQuAD-style data, evaluate it, and answer questions.

    python run_mrc.py --model_name_or_path MODEL --train_file KorQuAD_v1.0_train.json --output_dir my-reader

or with `accelerate launch` or `torchrun` on several processes, or `python run_mrc.py arguments.json`. Without
`--validation_file` some articles of the training file are held out (`--validation_articles`, `--validation_split`).
"""

from dataclasses import asdict, replace

from accelerate import Accelerator

from mixlm.data.reading import predictions_of
from mixlm.data.squad import read_squad
from mixlm.errors import UserError, exits_on_user_error
from mixlm.evaluation.reading import count_korean
from mixlm.evaluation.reading_report import QUESTIONS_FILE
from mixlm.loading import require_room, require_vocabulary
from mixlm.reader import MixLMReader, load_for_reading
from mixlm.tokenization import load_tokenizer
from mixlm.training.arguments import parse_arguments
from mixlm.training.batches import TrainingBatches
from mixlm.training.fine_tuning import Questions, read_questions, run_seeds, write_lines, write_skipped
from mixlm.training.loop import train
from mixlm.training.objectives import ReadingObjective
from mixlm.training.publishing import push_run
from mixlm.training.reading import (
    ReadingArguments,
    changed_decoding,
    chosen_metric,
    decoding_of,
    judged_questions,
    read_over_ranks,
    reading_metrics,
    tune_particles,
    tuned,
    window_scores,
    write_predictions,
)
from mixlm.training.run import (
    CONFIGURATION_FILE,
    PREDICTIONS_FOLDER,
    SKIPPED_FILE,
    build_accelerator,
    end_processes,
    finish_run,
    on_main_process,
    prepare_run,
    say,
)
from mixlm.training.sharding import Engine

EVALUATION_ROWS = 32  # of a batch, where no training has said how many fit


def train_reader(arguments: ReadingArguments, accelerator: Accelerator, questions: Questions) -> dict[str, float]:
    """Train, and leave the model of the best checkpoint in the run's folder; returns its metrics."""
    source = arguments.model_name_or_path
    tokenizer = load_tokenizer(arguments.tokenizer or source)
    model, has_head = load_for_reading(source)
    if not has_head:
        say(accelerator, f"{source} has no head for question answering: a new one is trained")
    require_room(model, source, max_seq_length=arguments.max_seq_length)
    require_vocabulary(model, source, tokenizer)
    decoding, metric = decoding_of(arguments), chosen_metric(arguments, questions.validation)
    training = decoding.windows(questions.training, tokenizer, training=True)
    held_out = decoding.windows(questions.validation, tokenizer)
    arguments.fit_steps(len(training), accelerator.num_processes)
    say(
        accelerator,
        f"{len(training.examples):,} questions in {len(training):,} windows to train on for {arguments.num_steps:,} "
        f"steps, {len(questions.validation):,} in {len(held_out):,} to evaluate on; "
        f"questions cut to max_query_length: {training.cut_questions + held_out.cut_questions:,}",
    )
    if training.skipped:
        say(accelerator, f"questions that cannot be learned from: {len(training.skipped):,}, see {SKIPPED_FILE}")
    write_skipped([*questions.skipped, *training.skipped], arguments, accelerator)

    def evaluate(engine: Engine) -> dict[str, float]:
        scores = window_scores(engine, held_out, arguments.train_batch_size, tokenizer.pad_token_id, accelerator)
        predictions = predictions_of(held_out, decoding.read(held_out, scores))
        return reading_metrics(predictions, questions.validation, metric, decoding)

    batches = TrainingBatches(training, tokenizer.pad_token_id, arguments, accelerator)
    best = train(model, ReadingObjective, batches, arguments, accelerator, evaluate, tokenizer, decoding)
    finish_run(tokenizer, best, arguments, accelerator, tuned(decoding, best.metrics))
    return best.metrics


def load_reader(folder: str, arguments: ReadingArguments, accelerator: Accelerator) -> MixLMReader:
    """The reader that answers: the one just trained, or that of `model_name_or_path`."""
    rows = arguments.train_batch_size or EVALUATION_ROWS
    tokenizer = None if arguments.tokenizer is None else load_tokenizer(arguments.tokenizer)
    reader = MixLMReader.from_pretrained(folder, accelerator.device, rows, decoding_of(arguments), tokenizer)
    if reader.decoding.unanswerable != arguments.version_2_with_negative:
        flag = "give" if reader.decoding.unanswerable else "leave out"
        raise UserError(f"--model_name_or_path {folder}: was trained otherwise; {flag} --version_2_with_negative")
    reader.decoding = replace(reader.decoding, **changed_decoding(arguments))
    require_room(reader.model, folder, max_seq_length=reader.decoding.max_seq_length)
    return reader


def run(arguments: ReadingArguments) -> dict[str, float]:
    """Train, evaluate and predict, as far as is asked for; returns metrics by name, if there are any."""
    folder, model, metrics = arguments.run_folder, arguments.model_name_or_path, {}
    if arguments.do_eval and not arguments.do_train and (folder / CONFIGURATION_FILE).exists():
        raise UserError(f"{folder}: a model is there, whose own results would be lost; give another --output_dir")
    accelerator = prepare_run(arguments) if arguments.do_train else build_accelerator(arguments)
    if arguments.do_train or arguments.do_eval:
        questions = read_questions(arguments, "version_2_with_negative", arguments.do_train)
        if arguments.tune_decoding and not count_korean(example.context for example in questions.validation):
            raise UserError("--tune_decoding: no text to evaluate on is Korean; leave it out")
        for note in questions.notes:
            say(accelerator, note)
    if arguments.do_train:
        metrics = train_reader(arguments, accelerator, questions)
        model = str(folder)
    elif arguments.do_eval:
        write_skipped(questions.skipped, arguments, accelerator)
    if arguments.do_eval:
        reader = load_reader(model, arguments, accelerator)
        metric = chosen_metric(arguments, questions.validation)
        if arguments.tune_decoding:
            predictions, metrics = tune_particles(reader, questions.validation, metric, accelerator)
            on_main_process(accelerator, lambda: reader.decoding.save(folder))
        else:
            predictions = read_over_ranks(reader, questions.validation, accelerator)
            metrics = reading_metrics(predictions, questions.validation, metric, reader.decoding)
        on_main_process(accelerator, lambda: write_predictions(predictions, folder, metrics))

        def write_judged() -> None:
            judged = judged_questions(predictions, questions.validation, metric, reader)
            write_lines(folder / QUESTIONS_FILE, map(asdict, judged))

        on_main_process(accelerator, write_judged)
        say(accelerator, "".join(f"  {name:>29}  {value:,.2f}\n" for name, value in metrics.items()), end="")
        if arguments.tune_decoding:
            choice = "dropped" if reader.decoding.korean_particles else "kept"
            say(accelerator, f"particles are {choice}, which was chosen on these very questions")
    if arguments.do_predict:
        examples = read_squad(arguments.predict_file, to_learn_from=False).examples
        answers = read_over_ranks(load_reader(model, arguments, accelerator), examples, accelerator)
        on_main_process(accelerator, lambda: write_predictions(answers, folder / PREDICTIONS_FOLDER))
    places = {folder: arguments.do_eval, folder / PREDICTIONS_FOLDER: arguments.do_predict}
    if written := [str(place) for place, is_written in places.items() if is_written]:
        say(accelerator, f"answers are in {' and '.join(written)}")
    push_run(arguments, accelerator)
    return metrics


@exits_on_user_error
def main():
    arguments = parse_arguments(ReadingArguments)
    run(arguments) if arguments.seeds is None else run_seeds(run, arguments)
    end_processes()


if __name__ == "__main__":
    main()
