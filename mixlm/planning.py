"""What a training will need before it is started: what `mixlm plan` shows.

A step of the whole model runs on tensors without content (torch's FakeTensor), which takes no memory, whatever the
size of the model. What is alive at each moment of it is written down. How the engines of `training.sharding` share out
parameters, gradients and moments is arithmetic on top of that; see docs/planning.md for how near it comes.
"""

import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForPreTraining, PreTrainedConfig

from .configuration import MixLMConfig, MixLMSwitchConfig
from .errors import UserError
from .profiling import MASKED_SHARE, random_batch
from .training.optimization import AdamW
from .training.precision import PRECISIONS, autocast
from .training.sharding import sharding_units

# What of a device's memory a plan leaves to its libraries, to fragmentation and to the buffers within operators.
MARGIN = 0.1
BYTES = 4  # of an entry of a parameter, a gradient or a moment, whatever the precision of the products
MOMENTS = 2  # AdamW's, of each parameter
# Training steps of a measurement: those that bring everything into being, those that are measured.
WARM_UP_STEPS, MEASURED_STEPS, PROBE_STEPS = 2, 2, 20
TIMEOUT_SECONDS = 1800


class Setting(NamedTuple):
    """How a model is to be trained.

    Args:
        zero, sharding_backend, auto_wrap: as in `TrainingArguments`.
        ranks: processes that train together.
        precision: "fp32", "bf16" or "fp16".
        device: "cpu" or "cuda".
    """

    zero: int
    sharding_backend: str
    auto_wrap: bool
    ranks: int
    precision: str
    device: str

    @property
    def is_fully_sharded(self) -> bool:
        """Whether every parameter is cut into pieces, rather than whole on every rank."""
        by_owner = self.sharding_backend == "fairscale" and not self.auto_wrap
        return self.ranks > 1 and self.zero >= (3 if by_owner else 2)


class Use(NamedTuple):
    """Bytes of one rank at one moment, by kind.

    Args:
        moment: when that is.
        parameters, gradients, moments: what the rank keeps of them.
        activations: what the forward pass has kept for the backward pass, inputs included.
        working: all else: results that are needed for a moment, whole gradients on their way to their owners,
            parameters that are gathered.
    """

    moment: str
    parameters: int = 0
    gradients: int = 0
    moments: int = 0
    activations: int = 0
    working: int = 0

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self[1:])


class Plan(NamedTuple):
    """The answer for one setting.

    Args:
        use: at the moment when it is largest.
        most_rows: of a rank, that fit its memory; 0 where not even one does.
    """

    use: Use
    most_rows: int


# -- a step without memory -------------------------------------------------------------------------------------------


class Moment(NamedTuple):
    """A stretch of a step that ends when a parameter's gradient is complete; the forward pass is one stretch.

    Args:
        activations, temporary: bytes, when there are most of both together. Parameters and their gradients are in
            neither.
        growing: the numbers of the parameters whose gradients are there, but not complete before its end.
        complete: the number of the parameter whose gradient is complete at its end; None for the forward pass.
    """

    activations: int
    temporary: int
    growing: frozenset[int]
    complete: int | None


class Parameter(NamedTuple):
    """What counts of a parameter: its shape, its sharding unit, and whether AdamW lets it decay."""

    shape: torch.Size
    unit: int
    decays: bool

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return self.shape.numel()


class Step(NamedTuple):
    """A training step of a model, with so many rows, as one process makes it.

    Args:
        rows: of the batch.
        parameters: of the model, in its order.
        moments: in their order.
        calls: how often the forward pass uses the module of each sharding unit.
    """

    rows: int
    parameters: list[Parameter]
    moments: list[Moment]
    calls: list[int]


def simulate_step(config: PreTrainedConfig, rows: int, length: int, setting: Setting) -> Step:
    """Run a pretraining step on tensors without content.

    Args:
        config: of the model.
        rows, length: of the batch, all real tokens, 15% of them to be predicted. ICT has as many contexts.
        setting: of it counts what a step of one process depends on: precision, device, and whether the engine wraps
            layers, which the fused kernels do not go with.
    """
    config = type(config).from_dict(config.to_dict())
    wrapped = setting.is_fully_sharded and setting.auto_wrap
    if config.kernels == "auto" and setting.device != "cpu" or wrapped:
        config.kernels = "plain"
    fake_device = torch.device("cpu")  # also for CUDA, whose ways `_WithoutData` imitates: torch may be built without
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(_WithoutData(setting))
        if setting.device != "cpu":
            stack.enter_context(mock.patch("mixlm.kernels.draws_from_seed", lambda hidden: False))
        model = AutoModelForPreTraining.from_config(config, dtype=torch.float32).train()
        decayed = set(AdamW(0.0, 0.0, 0.0).groups(model)[0]["params"])
        units = sharding_units(model)
        unit_of = {parameter: number for number, unit in enumerate(units) for parameter in unit.parameters}
        calls = [0] * len(units)
        memory = _Memory(list(model.parameters()))
        with memory:
            with autocast(setting.precision, fake_device):
                loss = model(**random_batch(config, rows, length)).loss
            memory.end_forward()
            loss.backward()
        moments = memory.moments()
    for name in _modules_called(config):
        calls[name] += 1
    parameters = [
        Parameter(parameter.shape, unit_of[parameter], parameter in decayed) for parameter in model.parameters()
    ]
    return Step(rows, parameters, moments, calls)
