"""Tiny models, synthetic rows and short runs, for which no tokenizer and no corpus is needed, and what runs leave.

Importable by the ranks of tests with several processes; conftest makes fixtures of it.
"""

import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import Dataset

import mixlm
from mixlm.data.batching import LengthBucketedBatches, training_batches
from mixlm.data.retrieval import EMPTY_PASSAGE
from mixlm.training.arguments import TrainingArguments
from mixlm.training.batches import TrainingBatches
from mixlm.training.checkpoint import checkpoints_in, read_state
from mixlm.training.loop import train
from mixlm.training.objectives import (
    InverseClozeObjective,
    ReadingObjective,
    RetrievalObjective,
    SentenceOrderObjective,
)
from mixlm.training.report import Curves, read_curves
from mixlm.training.run import prepare_run

VOCABULARY = 40
MASK, FIRST_WORD = 4, 5
ROWS_PER_STEP = 8
PASSAGES = 12  # so that those of a step repeat
EMPTY_PASSAGE_IDS = torch.tensor([2, 3])
OBJECTIVES = {
    "SOP": SentenceOrderObjective,
    "ICT": InverseClozeObjective,
    "reading": ReadingObjective,
    "retrieval": partial(RetrievalObjective, temperature=0.5, empty_passage=EMPTY_PASSAGE_IDS),
}
CONFIGURATIONS = {
    "mixlm": (mixlm.MixLMConfig, {"kernel_size": 5, "n_experts": 2, "num_heads": 2}),
    "switch": (mixlm.MixLMSwitchConfig, {"n_experts": 3, "num_heads": 2}),
}
PRETRAINING = {"mixlm": mixlm.MixLMForPreTraining, "switch": mixlm.MixLMSwitchForPreTraining}
FINE_TUNING = {
    "reading": {"mixlm": mixlm.MixLMForQuestionAnswering, "switch": mixlm.MixLMSwitchForQuestionAnswering},
    "retrieval": {"mixlm": mixlm.MixLMForRetrieval, "switch": mixlm.MixLMSwitchForRetrieval},
}


def reset_accelerate() -> None:
    """Accelerate keeps device and process group for the whole process; a run gets its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Rows(Dataset):
    """Rows of different lengths and different numbers of masked tokens, each a function of (epoch, index)."""

    def __init__(self, task: str, size: int = 37):
        self.task = task
        self.lengths = np.random.default_rng(0).integers(6, 16, size)

    def __len__(self) -> int:
        return len(self.lengths)

    def longest(self) -> dict[str, np.ndarray | int]:
        """As the batch size is found with."""
        return self[0, int(np.argmax(self.lengths))]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, np.ndarray | int]:
        random = np.random.default_rng((7, *key))
        length = int(self.lengths[key[1]])
        input_ids, labels = self._text(random, length)
        if self.task == "reading":
            start = int(random.integers(0, length - 1))
            token_type_ids = (np.arange(length) >= 3).astype(np.int64)
            answer = {"start_positions": start, "end_positions": start + 1}
            return {"input_ids": input_ids, "token_type_ids": token_type_ids, **answer, "window": key[1]}
        if self.task == "retrieval":
            passages = self._passages(random)
            texts = [passage_ids(number) for number in passages]
            passage = {"passage": passages[0], "context_input_ids": texts, "context_passage": passages}
            return {"input_ids": input_ids, **passage}
        if self.task == "ICT":
            context_input_ids, context_labels = self._text(random, int(random.integers(6, 16)))
            return {
                "input_ids": input_ids,
                "labels": labels,
                "context_input_ids": context_input_ids,
                "context_labels": context_labels,
            }
        token_type_ids = (np.arange(length) >= length // 2).astype(np.int64)
        order = int(random.choice([0, 1, -100]))
        return {
            "input_ids": input_ids,
            "token_type_ids": token_type_ids,
            "labels": labels,
            "sentence_order_label": order,
        }

    @staticmethod
    def _passages(random: np.random.Generator) -> list[int]:
        """The number of a question's own passage, sometimes the empty one, and those of up to two hard negatives."""
        passages = random.permutation(PASSAGES)[: int(random.integers(1, 4))].tolist()
        return [EMPTY_PASSAGE, *passages[1:]] if random.random() < 0.2 else passages

    @staticmethod
    def _text(random: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        ids = random.integers(FIRST_WORD, VOCABULARY, length)
        labels = np.full(length, -100)
        chosen = random.permutation(length)[: int(random.integers(0, 5))]
        labels[chosen] = ids[chosen]
        ids[chosen] = MASK
        return ids, labels


def passage_ids(number: int) -> np.ndarray:
    """Token ids of a passage, wherever it is."""
    if number == EMPTY_PASSAGE:
        return EMPTY_PASSAGE_IDS.numpy()
    random = np.random.default_rng((11, number))
    return random.integers(FIRST_WORD, VOCABULARY, int(random.integers(6, 16)))


def build_model(family: str = "mixlm", task: str = "SOP", seed: int = 0, **fields):
    """A model of the task whose every part has an effect, in training mode."""
    config_class, family_fields = CONFIGURATIONS[family]
    model_class = FINE_TUNING.get(task, PRETRAINING)[family]
    objective = {} if task in FINE_TUNING else {"pretraining_objective": task.lower()}
    config = config_class(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "ff_dim": 24,
            "max_position_embeddings": 16,
            "dropout_prob": 0.0,
            "initializer_range": 0.2,
            **objective,
            **family_fields,
            **fields,
        }
    )
    torch.manual_seed(seed)
    return model_class(config).train()


def build_arguments(output_dir: str, **fields) -> TrainingArguments:
    """TrainingArguments of a short run."""
    defaults = {
        "model_name": "run",
        "output_dir": output_dir,
        "learning_rate": 3e-3,
        "num_steps": 6,
        "logging_steps": 1,
        "num_workers": 0,
        "gradient_accumulation_steps": 2,
    }
    return TrainingArguments(**{**defaults, **fields})


class SmallBatches(TrainingBatches):
    """`Rows`, 8 to a step over all ranks, windows of 2 steps; more of them where memory is to end a search."""

    def __init__(self, task: str, arguments: TrainingArguments, accelerator: Accelerator):
        super().__init__(Rows(task, 4096), 0, arguments, accelerator)
        self.rows = Rows(task)

    def __call__(self, position):
        order = LengthBucketedBatches(
            self.rows.lengths,
            seed=self.arguments.seed,
            rows_per_step=ROWS_PER_STEP,
            ranks=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            micro_batches=self.arguments.gradient_accumulation_steps,
            window_steps=2,
            max_steps_per_epoch=self.arguments.max_steps_per_epoch,
        )
        return training_batches(self.rows, order, position, pad_token_id=0, num_workers=self.arguments.num_workers)


def run_small(
    arguments: TrainingArguments,
    task: str = "SOP",
    objective_class=None,
    evaluate=None,
    family: str = "mixlm",
    dtype: torch.dtype = torch.float32,
    **fields,
):
    """`train` on `SmallBatches`; returns the model."""
    reset_accelerate()
    accelerator: Accelerator = prepare_run(arguments)
    model = build_model(family, task, arguments.seed, **{"dropout_prob": 0.2, **fields}).to(dtype)
    train(
        model,
        objective_class or OBJECTIVES[task],
        SmallBatches(task, arguments, accelerator),
        arguments,
        accelerator,
        evaluate or (lambda engine: {"parameters": float(sum(p.numel() for p in engine.parameters.values()))}),
    )
    if accelerator.num_processes == 1:  # the ranks of a test keep their process group
        accelerator.end_training()
    return model


class CountsSteps(SentenceOrderObjective):
    """`done` is the number of the step in this process, from 1, skipped ones included."""

    done = 0

    def begin_step(self, micro_batches):
        self.done += 1
        self.at_step(self.done)
        return super().begin_step(micro_batches)

    def at_step(self, number: int) -> None:
        """For a subclass that does something before a step."""


class NotANumberAt(CountsSteps):
    """The loss is NaN from the step `step` on."""

    step = 4

    def loss(self, batch, number, step):
        share, terms = super().loss(batch, number, step)
        return (share * math.nan if self.done >= self.step else share), terms


def signalled_at(step: int, *numbers: int) -> type[CountsSteps]:
    """An objective that sends signals to its own process before a step."""

    class Signalled(CountsSteps):
        def at_step(self, number):
            if number == step:
                for each in numbers:
                    os.kill(os.getpid(), each)

    return Signalled


def checkpoint_names(run_folder: Path) -> list[str]:
    return [path.name for path in checkpoints_in(run_folder / "checkpoints")]


def curves_without_speed(run_folder: Path) -> Curves:
    """All that two equal runs have in common."""
    curves = read_curves(run_folder)
    curves.pop("train/tokens_per_second")
    return curves


def assert_same_checkpoint(found: Path, expected: Path) -> None:
    """All numbers of two checkpoint folders are the same to the bit."""
    for file in ("model/model.safetensors", "optimizer.safetensors"):
        assert (found / file).read_bytes() == (expected / file).read_bytes(), file
    for name in ("step", "position", "scaler"):
        assert read_state(found)[name] == read_state(expected)[name], name
