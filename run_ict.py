#!/usr/bin/env python
"""Train an encoder to find the passage that answers a question, or that a sentence was taken from.

    python run_ict.py --model_name_or_path MODEL --train_file KorQuAD_v1.0_train.json --output_dir my-retriever
    python run_ict.py --model_name_or_path MODEL --corpus_path CORPUS --num_steps 2000 --output_dir my-retriever

or with `accelerate launch` or `torchrun` on several processes, or `python run_ict.py arguments.json`. Without
`--validation_file` some articles of the training file are held out (`--validation_articles`, `--validation_split`).
"""

from functools import partial

import torch

from mixlm.encoder import load_for_retrieval
from mixlm.errors import exits_on_user_error
from mixlm.loading import require_vocabulary
from mixlm.tokenization import load_tokenizer
from mixlm.training.arguments import parse_arguments
from mixlm.training.batches import TrainingBatches
from mixlm.training.fine_tuning import read_questions, run_seeds, write_skipped
from mixlm.training.loop import train
from mixlm.training.objectives import RetrievalObjective
from mixlm.training.publishing import push_run
from mixlm.training.retrieval import RetrievalArguments, evaluate_retrieval, pairs_of_corpus, pairs_of_questions
from mixlm.training.run import end_processes, finish_run, prepare_run, say


def run(arguments: RetrievalArguments) -> dict[str, float]:
    """Train, and leave the model of the best checkpoint in the run's folder; returns its metrics."""
    accelerator = prepare_run(arguments)
    source = arguments.model_name_or_path
    tokenizer = load_tokenizer(arguments.tokenizer or source)
    texts = arguments.encoding.tokenizer(tokenizer)
    if arguments.corpus_path is None:
        questions = read_questions(arguments, "null_passage")
        for note in questions.notes:
            say(accelerator, note)
        write_skipped(questions.skipped, arguments, accelerator)
        data = pairs_of_questions(arguments, questions, texts)
    else:
        data = pairs_of_corpus(arguments, tokenizer, texts)
    model, new_weights = load_for_retrieval(source, **arguments.model_fields)
    arguments.encoding.require_room(model, source)
    require_vocabulary(model, source, tokenizer)
    if new_weights:
        say(accelerator, f"{source} has no {', '.join(new_weights)}: they are trained anew")
    arguments.fit_steps(len(data.training), accelerator.num_processes)
    say(
        accelerator,
        f"{len(data.training):,} pairs and {data.hard_negatives:,} hard negatives to train on for "
        f"{arguments.num_steps:,} steps; {len(data.queries):,} queries search {len(data.passages):,} passages",
    )

    batches = TrainingBatches(data.training, tokenizer.pad_token_id, arguments, accelerator, window_steps=1)
    empty_passage = torch.from_numpy(texts.empty_passage) if arguments.null_passage else None
    best = train(
        model,
        partial(RetrievalObjective, temperature=arguments.temperature, empty_passage=empty_passage),
        batches,
        arguments,
        accelerator,
        lambda engine: evaluate_retrieval(engine, data, arguments.train_batch_size, texts, accelerator),
        tokenizer,
        arguments.encoding,
    )
    finish_run(tokenizer, best, arguments, accelerator, arguments.encoding)
    push_run(arguments, accelerator)
    return best.metrics


@exits_on_user_error
def main():
    arguments = parse_arguments(RetrievalArguments)
    run(arguments) if arguments.seeds is None else run_seeds(run, arguments)
    end_processes()


if __name__ == "__main__":
    main()
