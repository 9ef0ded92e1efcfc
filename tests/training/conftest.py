"""Tiny models and synthetic rows, for which no tokenizer and no corpus is needed."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import Dataset

import mixlm
from mixlm.data.batching import LengthBucketedBatches, collate, training_batches
from mixlm.training.arguments import TrainingArguments
from mixlm.training.loop import prepare_run, train
from mixlm.training.objectives import InverseClozeObjective, SentenceOrderObjective

VOCABULARY = 40
MASK, FIRST_WORD = 4, 5
OBJECTIVES = {"SOP": SentenceOrderObjective, "ICT": InverseClozeObjective}
FAMILIES = {
    "mixlm": (mixlm.MixLMConfig, mixlm.MixLMForPreTraining, {"kernel_size": 5, "n_experts": 2, "num_heads": 2}),
    "switch": (mixlm.MixLMSwitchConfig, mixlm.MixLMSwitchForPreTraining, {"n_experts": 3, "num_heads": 2}),
}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps precision and process group for the whole process; a test gets its own."""
    reset_accelerate()
    yield
    reset_accelerate()


def reset_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Rows(Dataset):
    """Rows of different lengths and different numbers of masked tokens, each a function of (epoch, index)."""

    def __init__(self, task: str, size: int = 37):
        self.task = task
        self.lengths = np.random.default_rng(0).integers(6, 16, size)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, np.ndarray | int]:
        random = np.random.default_rng((7, *key))
        length = int(self.lengths[key[1]])
        input_ids, labels = self._text(random, length)
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
    def _text(random: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        ids = random.integers(FIRST_WORD, VOCABULARY, length)
        labels = np.full(length, -100)
        chosen = random.permutation(length)[: int(random.integers(0, 5))]
        labels[chosen] = ids[chosen]
        ids[chosen] = MASK
        return ids, labels


@pytest.fixture
def make_model():
    """(family, task, **configuration) -> a ForPreTraining model whose every part has an effect, in training mode."""

    def make(family: str = "mixlm", task: str = "SOP", seed: int = 0, **fields):
        config_class, model_class, family_fields = FAMILIES[family]
        config = config_class(
            **{
                "vocab_size": VOCABULARY,
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "ff_dim": 24,
                "max_position_embeddings": 16,
                "dropout_prob": 0.0,
                "initializer_range": 0.2,
                "pretraining_objective": task.lower(),
                **family_fields,
                **fields,
            }
        )
        torch.manual_seed(seed)
        return model_class(config).train()

    return make


@pytest.fixture
def make_rows():
    """(task, numbers of rows) -> collated batch."""

    def make(task: str, indices) -> dict[str, torch.Tensor]:
        rows = Rows(task)
        return collate([rows[0, index] for index in indices], pad_token_id=0)

    return make


@pytest.fixture
def make_arguments(tmp_path):
    """TrainingArguments of a short run in a temporary folder."""

    def make(**fields) -> TrainingArguments:
        defaults = {
            "model_name": "run",
            "output_dir": str(tmp_path / "outputs"),
            "learning_rate": 3e-3,
            "num_steps": 6,
            "logging_steps": 1,
            "num_workers": 0,
            "gradient_accumulation_steps": 2,
        }
        return TrainingArguments(**{**defaults, **fields})

    return make


@pytest.fixture
def run_training(make_model):
    """(arguments, task, ...) -> the trained model: `train` on `Rows`, 8 to a step, windows of 2 steps."""

    def run(arguments: TrainingArguments, task: str = "SOP", objective_class=None, evaluate=None, **fields):
        reset_accelerate()
        accelerator: Accelerator = prepare_run(arguments)
        model = make_model(task=task, seed=arguments.seed, **{"dropout_prob": 0.2, **fields})
        rows = Rows(task)
        micro_batches = arguments.gradient_accumulation_steps
        order = LengthBucketedBatches(
            rows.lengths,
            seed=arguments.seed,
            rows_per_step=8,
            micro_batches=micro_batches,
            window_steps=2,
            max_steps_per_epoch=arguments.max_steps_per_epoch,
        )
        batches = partial(training_batches, rows, order, pad_token_id=0, num_workers=arguments.num_workers)
        train(
            model,
            objective_class or OBJECTIVES[task],
            lambda position: batches(position=position),
            arguments,
            accelerator,
            evaluate or (lambda model: {"parameters": float(sum(p.numel() for p in model.parameters()))}),
        )
        accelerator.end_training()
        return model

    return run


@pytest.fixture
def checkpoint_folder():
    """(arguments, step) -> the folder of a checkpoint."""

    def folder(arguments: TrainingArguments, step: int) -> Path:
        return arguments.run_folder / "checkpoints" / f"step-{step:08d}"

    return folder
