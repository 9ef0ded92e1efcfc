"""One run of a study: `python train_one.py SPECIFICATION.json FOLDER`; what came of it is in FOLDER/result.json.

It is the loop, the data and the held-out loss of run_pretraining.py. What is added is the budget: CPU time becomes a
number of steps by timing a few of them first, on a quiet machine, since other programs make it longer. Killed and
started again, it goes on from the last checkpoint at which the curve has a point, and ends as if nothing had been.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run_pretraining.py, which candidates takes too
from accelerate import Accelerator
from candidates import NEW_MODELS, TRAININGS
from metering import STEPS_BEFORE_TIMING, TIMED_STEPS, Meter, cost_of_a_step
from models import PEERS, build_model, parameter_counts
from one_run import make_one
from torch import nn
from transformers import PreTrainedTokenizerBase

from mixlm.data.batching import Position, evaluation_batches
from mixlm.data.corpus import Document, read_documents
from mixlm.data.examples import SentenceOrderExamples
from mixlm.data.store import TokenizedCorpus, open_corpus
from mixlm.files import write_whole
from mixlm.tokenization import load_tokenizer
from mixlm.training.arguments import PretrainingArguments
from mixlm.training.batches import TrainingBatches
from mixlm.training.checkpoint import checkpoints_in, prune, step_of
from mixlm.training.evaluation import evaluate_pretraining, unigram_log_probabilities
from mixlm.training.loop import train
from mixlm.training.objectives import Batch
from mixlm.training.run import CHECKPOINTS, prepare_run
from mixlm.training.sharding import Engine
from run_pretraining import OBJECTIVES, build_examples

# What a run is unless its specification says otherwise: where the search for the recipe began, so that the tables
# mean the same whatever the defaults of run_pretraining.py become.
DEFAULTS = {
    "max_seq_length": 64,
    "train_batch_size": 16,
    "learning_rate": 1e-3,
    "warmup_ratio": 0.05,
    "decay_ratio": 1.0,
    "weight_decay": 0.01,
    "mlm_probability": 0.15,
    "masking": "ngram",
}
# Every run is judged on the same texts under the same masks.
HELD_OUT = {"max_seq_length": 64, "seed": 0}
# Evaluations on the way: a short run has the fewest, a long one the most.
FEWEST_POINTS, MOST_POINTS, STEPS_OF_A_POINT = 8, 32, 250
CURVE_EXAMPLES, FINAL_EXAMPLES = 250, 1000
EPOCHS_OF_A_STAGE = 1000  # more than there are
MORE_STEPS_THAN_ARE_TIMED = 1 + STEPS_BEFORE_TIMING + TIMED_STEPS
DOCUMENTS_TO_MEASURE = 1000


class StagedBatches:
    """Batches of one stage after the other, as `loop.train` asks for them; no stage sees an example as another has.

    Args:
        stages: the step before which each begins, ascending from 0, and its batches.
        done: steps that are made already.
    """

    def __init__(self, stages: list[tuple[int, TrainingBatches]], done: int):
        self.stages, self.done = stages, done

    def __call__(self, position: Position) -> Iterator[tuple[Position, list[Batch]]]:
        """Step by step the position after it and the micro-batches; `position` is the one after step `done`."""
        step = self.done
        ends = [first for first, _ in self.stages[1:]] + [math.inf]
        for stage, ((_, batches), end) in enumerate(zip(self.stages, ends, strict=True)):
            if step >= end:
                continue
            for after, micro_batches in batches(position):
                step += 1
                if step == end:
                    position = Position(epoch=(stage + 1) * EPOCHS_OF_A_STAGE)
                    yield position, micro_batches
                    break
                yield after, micro_batches


def arguments_of(specification: dict[str, Any], folder: Path, name: str, **more: Any) -> PretrainingArguments:
    """The arguments of a run of run_pretraining.py, in `folder`/`name`."""
    return PretrainingArguments(
        model_name=name,
        output_dir=str(folder),
        corpus_path=specification["corpus"],
        tokenizer=specification["tokenizer"],
        num_workers=0,
        **{**DEFAULTS, **specification["arguments"], "seed": specification["seed"], **more},
    )


def train_once(
    arguments: PretrainingArguments,
    specification: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    meter: Meter,
    evaluate: Callable[[Engine, Accelerator], dict[str, float]],
    done: int = 0,
) -> tuple[nn.Module, dict[str, float]]:
    """A training by mixlm's loop, of which `done` steps are made; returns the model and the metrics of its end."""
    accelerator = prepare_run(arguments)
    objective = {} if specification["model"] in PEERS else {"pretraining_objective": arguments.task.lower()}
    model = build_model(specification["model"], {**objective, **specification["fields"]}, tokenizer)
    candidates = specification["candidates"]
    stages = []
    for stage in [{"from": 0.0}, *specification["stages"]]:
        changed = {name: value for name, value in stage.items() if name != "from"}
        own = replace(arguments, **changed)
        corpus = open_training_corpus(own, tokenizer)
        training, _ = build_examples(own, tokenizer, corpus)
        first = round(stage["from"] * arguments.num_steps)
        stages.append((first, TrainingBatches(training, tokenizer.pad_token_id, own, accelerator)))
    unigram = unigram_log_probabilities(corpus.token_counts)
    for name in candidates:
        if name in NEW_MODELS:
            NEW_MODELS[name](model, unigram)
    batches = StagedBatches(stages, done)
    with ExitStack() as trainings:
        trainings.callback(accelerator.end_training)
        for name in candidates:
            if name in TRAININGS:
                trainings.enter_context(TRAININGS[name]())
        last = train(
            model,
            OBJECTIVES[arguments.task],
            lambda position: meter.over(batches(position)),
            arguments,
            accelerator,
            evaluate=lambda engine: evaluate(engine, accelerator),
        )
    return model, last.metrics


def train_first_steps(
    specification: dict[str, Any], folder: Path, tokenizer: PreTrainedTokenizerBase, meter: Meter
) -> None:
    """A training whose steps are to be timed, with a curve and checkpoints of nothing."""
    steps = {"num_steps": MORE_STEPS_THAN_ARE_TIMED, "overwrite_output_dir": True, "save_steps": 0}
    arguments = arguments_of(specification, folder, "timing", **steps)
    train_once(arguments, specification, tokenizer, meter, lambda *_: {})


def open_training_corpus(arguments: PretrainingArguments, tokenizer: PreTrainedTokenizerBase) -> TokenizedCorpus:
    """The corpus as run_pretraining.py opens it."""
    longest = arguments.max_seq_length - SentenceOrderExamples.special_tokens
    return open_corpus(arguments.corpus_path, tokenizer, max_sentence_length=longest)


def number_of_steps(specification: dict[str, Any], cost: Callable[[], tuple[float, float]]) -> int:
    """Of a run, by its budget: `steps`, or `tokens`, or `minutes` of CPU time.

    Args:
        specification: of the run.
        cost: measures the CPU seconds and tokens of a step.
    """
    if "steps" in specification:
        return specification["steps"]
    seconds, tokens = cost()
    if "tokens" in specification:
        return max(FEWEST_POINTS, round(specification["tokens"] / tokens))
    return max(FEWEST_POINTS, round(60 * specification["minutes"] / seconds))


def step_with_point(checkpoints: Path, curve: list[dict[str, float]]) -> int:
    """The step of the newest checkpoint at which the curve has a point, and 0 if there is none; others are deleted."""
    steps = {point["step"] for point in curve}
    kept = [path for path in checkpoints_in(checkpoints) if step_of(path) in steps][-1:]
    if checkpoints.is_dir():
        prune(checkpoints, kept)
    return step_of(kept[0]) if kept else 0


def take_up(file: Path, done: int, steps: int) -> list[int]:
    """The steps, of `steps`, after which a run was taken up again, `done` among them; `file` keeps them."""
    seams = json.loads(file.read_text()) if file.is_file() else []
    if 0 < done < steps and done not in seams:
        seams.append(done)
        write_whole(file, json.dumps(seams))
    return seams


def train_one(specification: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train to the end of the budget; returns what is to be written down.

    Args:
        specification: what study.py says of a line, with one seed, and the paths `corpus` and `tokenizer`.
        folder: for the checkpoints, which are of no use afterwards.
    """
    tokenizer = load_tokenizer(specification["tokenizer"])
    held_out_arguments = PretrainingArguments(
        "held-out",
        corpus_path=specification["corpus"],
        tokenizer=specification["tokenizer"],
        max_eval_examples=FINAL_EXAMPLES,
        task=specification["arguments"].get("task", "SOP"),
        **{**HELD_OUT, **specification["held_out"]},
    )
    corpus = open_training_corpus(held_out_arguments, tokenizer)
    unigram = unigram_log_probabilities(corpus.token_counts)
    train_to_time = partial(train_first_steps, specification, folder, tokenizer)
    steps = number_of_steps(specification, lambda: cost_of_a_step(train_to_time, folder / "cost_of_a_step.json"))

    number_of_points = min(max(steps // STEPS_OF_A_POINT, FEWEST_POINTS), MOST_POINTS)
    point_steps = max(1, steps // number_of_points)
    arguments = arguments_of(
        specification,
        folder,
        "run",
        num_steps=steps,
        eval_steps=point_steps,
        save_steps=point_steps,  # so that where a run goes on, its cost until there is known
        # The newest can be without a point: one is written wherever a run is stopped, and the last before its point.
        save_total_limit=2,
        resume="auto",
    )
    curve_file = folder / "curve.jsonl"
    curve = [json.loads(line) for line in curve_file.read_text().splitlines()] if curve_file.is_file() else []
    done = step_with_point(arguments.run_folder / CHECKPOINTS, curve)
    curve = [point for point in curve if point["step"] <= done]
    taken_up_at = take_up(folder / "taken_up_at.json", done, steps)
    meter = Meter(curve[-1]["cpu_seconds"], curve[-1]["tokens"]) if curve else Meter()

    def evaluate(engine: Engine, accelerator: Accelerator) -> dict[str, float]:
        meter.pause()
        step = min(curve[-1]["step"] + point_steps if curve else point_steps, steps)
        _, held_out = build_examples(held_out_arguments, tokenizer, corpus)
        if step < steps:
            held_out.limit(CURVE_EXAMPLES)
        batches = evaluation_batches(held_out, arguments.train_batch_size, tokenizer.pad_token_id)
        metrics = evaluate_pretraining(engine, batches, accelerator, unigram)
        # Killed after its end and before its result, a run is judged at its end once more.
        before = [point for point in curve if point["step"] < step]
        curve[:] = [*before, {"step": step, "cpu_seconds": meter.seconds, "tokens": meter.tokens, **metrics}]
        write_whole(curve_file, "".join(json.dumps(point) + "\n" for point in curve))
        meter.resume()
        return metrics

    model, metrics = train_once(arguments, specification, tokenizer, meter, evaluate, done)
    if specification["keep_model"]:
        own = model.masked_lm if specification["model"] in PEERS else model
        own.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    documents = list(islice(read_documents(specification["corpus"]), DOCUMENTS_TO_MEASURE))
    return {
        **parameter_counts(model),
        "characters_per_token": characters_per_token(tokenizer, documents),
        "steps": steps,
        "curve": curve,
        "metrics": metrics,
        **({"taken_up_at": taken_up_at} if taken_up_at else {}),
    }


def characters_per_token(tokenizer: PreTrainedTokenizerBase, documents: list[Document]) -> float:
    """By which losses per token of different vocabularies become comparable."""
    sentences = [sentence for document in documents for sentence in document.sentences]
    tokens = sum(map(len, tokenizer(sentences, add_special_tokens=False)["input_ids"]))
    return sum(map(len, sentences)) / tokens


if __name__ == "__main__":
    make_one(train_one, *sys.argv[1:])
