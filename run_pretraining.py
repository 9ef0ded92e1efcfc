#!/usr/bin/env python
"""Pretrain a MixLM or Switch encoder with masked tokens and sentence order (SOP) or the inverse cloze task (ICT).

    python run_pretraining.py --model_name my-model --corpus_path CORPUS --tokenizer TOKENIZER --num_steps 2000

or `accelerate launch --num_processes 2 run_pretraining.py ...` (with `--cpu` on a machine without GPUs), or
`python run_pretraining.py arguments.json`.
"""

import numpy as np
import torch

from mixlm import MixLMConfig, MixLMForPreTraining, MixLMSwitchConfig, MixLMSwitchForPreTraining
from mixlm.data.batching import evaluation_batches
from mixlm.data.examples import InverseClozeExamples, SentenceOrderExamples
from mixlm.data.masking import TokenMasker
from mixlm.data.store import TokenizedCorpus, open_corpus
from mixlm.errors import UserError, exits_on_user_error
from mixlm.loading import require_token_types
from mixlm.tokenization import load_tokenizer, word_start_table
from mixlm.training.arguments import PretrainingArguments, parse_arguments
from mixlm.training.batches import TrainingBatches
from mixlm.training.evaluation import (
    EVALUATION_MASKING,
    EVALUATION_MASKING_PROBABILITY,
    evaluate_pretraining,
    unigram_log_probabilities,
)
from mixlm.training.loop import train
from mixlm.training.objectives import InverseClozeObjective, SentenceOrderObjective
from mixlm.training.publishing import push_run
from mixlm.training.run import end_processes, finish_run, prepare_run, say

FAMILIES = {
    "mixlm": (MixLMConfig, MixLMForPreTraining),
    "switch": (MixLMSwitchConfig, MixLMSwitchForPreTraining),
}
OBJECTIVES = {"SOP": SentenceOrderObjective, "ICT": InverseClozeObjective}


def build_model(arguments: PretrainingArguments, tokenizer):
    """A new model by preset or configuration file, whose vocabulary is the tokenizer's."""
    config_class, model_class = FAMILIES[arguments.family]
    overrides = {"pretraining_objective": arguments.task.lower(), "pad_token_id": tokenizer.pad_token_id}
    if arguments.preset is not None:
        overrides["vocab_size"] = len(tokenizer)
    source = arguments.preset or arguments.config_file
    try:
        config = config_class.from_preset(source, **overrides)
    except ValueError as error:
        raise UserError(str(error)) from error
    if config.vocab_size != len(tokenizer):
        raise UserError(
            f"{source}: vocab_size={config.vocab_size}, but the tokenizer {arguments.tokenizer} has {len(tokenizer)} "
            f"tokens; set vocab_size to that"
        )
    if arguments.max_seq_length > config.max_position_embeddings:
        raise UserError(
            f"--max_seq_length={arguments.max_seq_length} is above max_position_embeddings="
            f"{config.max_position_embeddings} of {source}; use a shorter length or another configuration"
        )
    if arguments.task == "SOP":
        require_token_types(config, str(source))
    return model_class(config)


def build_examples(arguments: PretrainingArguments, tokenizer, corpus: TokenizedCorpus):
    """The training examples, and the held-out ones: masked alike in all runs, ICT's query never in its block."""
    blocks = corpus.blocks(arguments.max_seq_length - SentenceOrderExamples.special_tokens)
    is_held_out = corpus.held_out(arguments.eval_split)[blocks[:, 0]]
    word_start = word_start_table(tokenizer)

    def build(blocks: np.ndarray, mlm_probability: float, masking: str, remove_query_probability: float, seed: int):
        masker = TokenMasker(
            len(tokenizer),
            tokenizer.mask_token_id,
            tokenizer.all_special_ids,
            word_start,
            mlm_probability,
            masking,
        )
        ids = (tokenizer.cls_token_id, tokenizer.sep_token_id)
        common = (corpus, blocks, masker, *ids, arguments.max_seq_length, seed)
        if arguments.task == "SOP":
            return SentenceOrderExamples(*common)
        return InverseClozeExamples(*common, remove_query_probability)

    training = build(
        blocks[~is_held_out],
        arguments.mlm_probability,
        arguments.masking,
        arguments.remove_query_probability,
        arguments.seed,
    )
    held_out = build(
        blocks[is_held_out],
        EVALUATION_MASKING_PROBABILITY,
        EVALUATION_MASKING,
        remove_query_probability=1.0,
        seed=0,
    )
    held_out.limit(arguments.max_eval_examples)
    if not len(held_out):
        raise UserError(
            f"--eval_split={arguments.eval_split}: no held-out document has a block of two sentences, as ICT needs; "
            "hold out more, or use a longer --max_seq_length"
        )
    return training, held_out


@exits_on_user_error
def main():
    arguments = parse_arguments(PretrainingArguments)
    accelerator = prepare_run(arguments)
    tokenizer = load_tokenizer(arguments.tokenizer)
    model = build_model(arguments, tokenizer)
    arguments.fit_learning_rate(model.config.hidden_size)
    corpus = open_corpus(
        arguments.corpus_path,
        tokenizer,
        max_sentence_length=arguments.max_seq_length - SentenceOrderExamples.special_tokens,
        cache_dir=arguments.cache_dir,
        dataset=arguments.dataset_name,
        text_column=arguments.text_column,
        config_name=arguments.dataset_config_name,
        streaming=arguments.streaming,
    )
    training, held_out = build_examples(arguments, tokenizer, corpus)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(
        accelerator,
        f"{arguments.model_name}: {parameters / 1e6:.1f}M parameters, {len(training):,} training blocks of "
        f"{corpus.num_documents:,} documents ({corpus.num_tokens:,} tokens), {len(held_out):,} held-out blocks; "
        f"{corpus.cut_sentences:,} sentences were longer than max_seq_length and cut",
    )
    ranks, rank = accelerator.num_processes, accelerator.process_index
    unigram = unigram_log_probabilities(corpus.token_counts)
    # A new model begins with how often each token occurs, which it would else spend its first hundreds of steps on.
    with torch.no_grad():
        model.get_output_embeddings().bias.copy_(unigram)

    def evaluate(engine) -> dict[str, float]:
        batches = evaluation_batches(held_out, arguments.train_batch_size, tokenizer.pad_token_id, rank, ranks)
        return evaluate_pretraining(engine, batches, accelerator, unigram)

    batches = TrainingBatches(training, tokenizer.pad_token_id, arguments, accelerator)
    last = train(model, OBJECTIVES[arguments.task], batches, arguments, accelerator, evaluate, tokenizer)
    finish_run(tokenizer, last, arguments, accelerator)
    push_run(arguments, accelerator)
    end_processes()


if __name__ == "__main__":
    main()
