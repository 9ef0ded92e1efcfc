"""Shared fixtures. Tests are offline, and find the real data through MIXLM_DATA."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

REPOSITORY = Path(__file__).parent.parent
DATA = Path(os.environ.get("MIXLM_DATA", REPOSITORY.parent / "shared" / "data"))
GOLDEN = Path(os.environ.get("MIXLM_GOLDEN", DATA.parent / "golden"))

# Two test processes on two cores: more threads would only fight each other.
torch.set_num_threads(1)


@pytest.fixture
def real_data() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"the trial data is not at {DATA}; set MIXLM_DATA")
    return DATA


@pytest.fixture
def golden() -> Path:
    if not GOLDEN.is_dir():
        pytest.skip(f"the golden values are not at {GOLDEN}; set MIXLM_GOLDEN")
    return GOLDEN


@pytest.fixture
def blocks_end_inside_texts(monkeypatch):
    """Small models have several blocks of tokens in the fused kernels, as large ones have."""
    monkeypatch.setattr("mixlm.kernels.TOKENS_PER_BLOCK", 5)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps precision and process group for the whole process; a test leaves nothing to the next."""
    yield
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
