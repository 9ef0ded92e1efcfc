"""The models, rows and runs of `small_runs` as fixtures, and several ranks to run them on."""

from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import Ranks
from small_runs import Rows, build_arguments, build_model, run_small

from mixlm.data.batching import collate
from mixlm.training.arguments import TrainingArguments


@pytest.fixture
def make_model():
    """(family, task, seed, **configuration) -> a model of the task."""
    return build_model


@pytest.fixture
def make_rows():
    """(task, numbers of rows) -> collated batch."""

    def make(task: str, indices) -> dict[str, torch.Tensor]:
        rows = Rows(task)
        return collate([rows[0, index] for index in indices], pad_token_id=0)

    return make


@pytest.fixture
def make_arguments(tmp_path):
    """(**fields) -> TrainingArguments of a short run in a temporary folder."""
    return partial(build_arguments, output_dir=str(tmp_path / "outputs"))


@pytest.fixture
def run_training():
    """(arguments, task, ...) -> the trained model."""
    return run_small


@pytest.fixture
def checkpoint_folder():
    """(arguments, step) -> the folder of a checkpoint."""

    def folder(arguments: TrainingArguments, step: int) -> Path:
        return arguments.run_folder / "checkpoints" / f"step-{step:08d}"

    return folder


@pytest.fixture(scope="session")
def two_ranks():
    """(function, *arguments) -> what each of two ranks returns. They are started with the first call."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def four_ranks():
    """As `two_ranks`."""
    ranks = Ranks(4)
    yield ranks
    ranks.stop()
