"""Where a step spends time, arithmetic and memory: what `mixlm profile` shows.

Each quantity is measured in steps of its own, so that no instrument disturbs another: time without any, operators
under torch's profiler, floating-point operations and memory under a dispatch mode, which sees every operator that
runs, also those of custom autograd functions and of the backward pass.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    conv_flop_count,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)
from transformers import AutoModel, AutoModelForPreTraining, PreTrainedConfig, PreTrainedModel

from .configuration import read_config
from .errors import UserError
from .heads import IGNORE
from .live_memory import LiveMemory, tensor_bytes
from .loading import load_model, own_config
from .progress import progress_bar
from .training.optimization import OptimizerSettings

BERT_MASKED_SHARE = 0.15  # what benchmarks are measured with
MATRIX_SIZE, MATRIX_PRODUCTS = 2048, 5  # what the peak rate is measured with


@dataclass(frozen=True)
class OperatorTime:
    """An operator, or several as one.

    Args:
        name: as torch names it.
        calls: in one step.
        seconds: in one step, without the operators that it calls.
        share: of the time of all operators.
    """

    name: str
    calls: float
    seconds: float
    share: float


@dataclass(frozen=True)
class MemoryUse:
    """Bytes by kind.

    Args:
        parameters: of the model, tied ones once.
        optimizer_state: what the optimizer keeps from step to step.
        gradients: of the parameters, at the end of the backward pass.
        activations: what the forward pass leaves alive for the backward pass, however it is kept.
        temporary: the most at any time of all other tensors.
        peak: the most at any time of everything above together.
    """

    parameters: int
    optimizer_state: int
    gradients: int
    activations: int
    temporary: int
    peak: int


@dataclass(frozen=True)
class Profile:
    """What was measured of a step.

    Args:
        tokens: real tokens of the batch.
        step_seconds: median.
        phase_seconds: medians of the phases, by name.
        operations: floating-point operations of all matrix products, convolutions and fused attention.
        peak_rate: floating-point operations a second of large float32 matrix products.
        operators: all of them, slowest first.
        memory: see `MemoryUse`.
    """

    tokens: int
    step_seconds: float
    phase_seconds: dict[str, float]
    operations: int
    peak_rate: float
    operators: list[OperatorTime]
    memory: MemoryUse

    @property
    def rate(self) -> float:
        """Floating-point operations a second."""
        return self.operations / self.step_seconds


# -- what is measured ------------------------------------------------------------------------------------------------


def preset_model(name: str, length: int, inference: bool) -> PreTrainedModel:
    """A preset with random weights and room for `length` tokens: the encoder for inference, else ForPreTraining.

    Raises:
        ValueError: there is no such preset.
    """
    config = read_config(name)
    config.max_position_embeddings = max(config.max_position_embeddings, length)
    return (AutoModel if inference else AutoModelForPreTraining).from_config(config)


def saved_model(name_or_folder: str, length: int, inference: bool) -> PreTrainedModel:
    """A saved model in float32, as `preset_model`; heads that were not saved have random weights.

    Raises:
        UserError: it cannot be loaded, is of another library, or takes fewer than `length` tokens.
    """
    config = own_config(name_or_folder)
    longest = config.max_position_embeddings
    if length > longest:
        raise UserError(f"--model {name_or_folder}: takes {longest:,} tokens, --shape has {length:,} a row")
    auto_class = AutoModel if inference else AutoModelForPreTraining
    return load_model(auto_class, name_or_folder, config=config, dtype=torch.float32)[0]


def random_batch(
    config: PreTrainedConfig, rows: int, length: int, masked_share: float = BERT_MASKED_SHARE
) -> dict[str, Tensor]:
    """A pretraining batch of random ids without padding, [rows, length], with so many of the tokens labelled.

    It has the inputs that `config.pretraining_objective` takes: of SOP, or queries and contexts of the same length.
    """

    def text(prefix: str) -> dict[str, Tensor]:
        input_ids = torch.randint(config.vocab_size, (rows, length))
        masked = torch.randperm(rows * length)[: max(1, round(masked_share * rows * length))]
        labels = torch.full((rows * length,), IGNORE)
        labels[masked] = input_ids.flatten()[masked]
        return {
            f"{prefix}input_ids": input_ids,
            f"{prefix}attention_mask": torch.ones_like(input_ids),
            f"{prefix}labels": labels.view(rows, length),
        }

    if config.pretraining_objective == "ict":
        return {**text(""), **text("context_")}
    token_types = (torch.arange(length) >= length // 2).long().expand(rows, length).contiguous()
    order = torch.arange(rows) % 2
    return {**text(""), "token_type_ids": token_types % config.type_vocab_size, "sentence_order_label": order}


class EncoderForward:
    """A forward pass of the encoder without gradients, over the texts of a batch.

    Args:
        model: the encoder.
        batch: inputs on the model's device; see `random_batch`.
    """

    optimizer = None

    def __init__(self, model: PreTrainedModel, batch: dict[str, Tensor]):
        self.model = model.eval()
        self.batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
        self.phases: dict[str, Callable[[], None]] = {"forward": self.forward}

    @torch.no_grad()
    def forward(self) -> None:
        self.model(**self.batch)


class TrainingStep:
    """A pretraining step: forward with the loss, backward, AdamW with zero_grad.

    Args:
        model: ForPreTraining.
        batch: inputs on the model's device; see `random_batch`.
    """

    def __init__(self, model: PreTrainedModel, batch: dict[str, Tensor]):
        self.model, self.batch = model.train(), batch
        self.optimizer = OptimizerSettings(learning_rate=1e-4, weight_decay=0.01, epsilon=1e-8).build(model)
        self.phases: dict[str, Callable[[], None]] = {
            "forward": self.forward,
            "backward": self.backward,
            "optimizer": self.optimize,
        }

    def forward(self) -> None:
        self.loss = self.model(**self.batch).loss

    def backward(self) -> None:
        self.loss.backward()
        del self.loss

    def optimize(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


Step = EncoderForward | TrainingStep


def profile_step(step: Step, steps: int) -> Profile:
    """Measure a step. It is run 2 x `steps` + 3 times, on the device of its model.

    Args:
        step: what to run.
        steps: how many to time, and how many to run under the profiler.
    """
    device = step.model.device
    with progress_bar(desc="profiling", total=2 * steps + 4, unit=" steps", leave=False) as progress:

        def done(result: Any) -> Any:
            progress.update()
            return result

        done(time_phases(step, device))  # warms up, and makes the optimizer's state
        times = [done(time_phases(step, device)) for _ in range(steps)]
        peak_rate = done(matrix_product_rate(device))
        operations = done(count_operations(lambda: run(step)))
        memory = done(measure_memory(step))
        operators = time_operators(lambda: done(run(step)), steps, device)
    return Profile(
        tokens=sum(int(mask.sum()) for name, mask in step.batch.items() if name.endswith("attention_mask")),
        step_seconds=statistics.median(sum(phases.values()) for phases in times),
        phase_seconds={name: statistics.median(phases[name] for phases in times) for name in step.phases},
        operations=operations,
        peak_rate=peak_rate,
        operators=operators,
        memory=memory,
    )


def run(step: Step) -> None:
    """All phases of a step."""
    for phase in step.phases.values():
        phase()


# -- time ------------------------------------------------------------------------------------------------------------


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes until its work on the device is done."""
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_phases(step: Step, device: torch.device) -> dict[str, float]:
    """Run a step and time its phases, in seconds by name."""
    return {name: seconds_of(phase, device) for name, phase in step.phases.items()}


def matrix_product_rate(device: torch.device) -> float:
    """Floating-point operations a second of the fastest of several large float32 matrix products."""
    left, right = (torch.rand(MATRIX_SIZE, MATRIX_SIZE, device=device) for _ in range(2))
    product = torch.mm(left, right)  # warms up
    seconds = [seconds_of(lambda: torch.mm(left, right, out=product), device) for _ in range(MATRIX_PRODUCTS)]
    return 2 * MATRIX_SIZE**3 / min(seconds)


def time_operators(run_step: Callable[[], Any], steps: int, device: torch.device) -> list[OperatorTime]:
    """The time of each operator in a step, slowest first.

    Args:
        run_step: runs one step.
        steps: how many to run; times are means over them.
        device: whose time counts: on CUDA that of the kernels which an operator starts.
    """
    on_cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells on stderr that it starts and stops
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            run_step()
        synchronize(device)
    microseconds = {
        event.key: (event.count, event.self_device_time_total if on_cuda else event.self_cpu_time_total)
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CPU  # a kernel's time is also that of the operator that started it
    }
    total = sum(time for _, time in microseconds.values())
    operators = [
        OperatorTime(name, calls / steps, time / steps / 1e6, time / total)
        for name, (calls, time) in microseconds.items()
    ]
    return sorted(operators, key=lambda operator: (-operator.seconds, operator.name))


def summarize_operators(operators: list[OperatorTime], top: int) -> list[OperatorTime]:
    """The first `top` operators, and the rest as one by the name of "others"."""
    rest = operators[top:]
    if not rest:
        return operators
    calls, seconds, share = (
        sum(getattr(operator, field) for operator in rest) for field in ("calls", "seconds", "share")
    )
    return [*operators[:top], OperatorTime("others", calls, seconds, share)]


# -- floating-point operations ---------------------------------------------------------------------------------------


def count_operations(function: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products, convolutions and fused attention that a call runs.

    A multiplication and an addition are two. What is computed twice counts twice.
    """
    with _OperationCounter() as counter:
        function()
    return counter.total


class _OperationCounter(TorchDispatchMode):
    """Adds up by formula what runs. torch's FlopCounterMode hooks into every module too, which makes a model leave its
    fused forms."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        options = options or {}
        formula = OPERATION_FORMULAS.get(operator.overloadpacket)
        if formula is None:
            with self:  # what is made of other operators is counted by them
                output = operator.decompose(*arguments, **options)
            if output is not NotImplemented:
                return output
        output = operator(*arguments, **options)
        if formula is not None:
            self.total += formula(*arguments, **options, out_val=output)
        return output


def _product_in_place(_: Any, left: list[int], right: list[int], **others: Any) -> int:
    return 2 * prod(left) * right[-1]


def _convolution_backward(
    output: list[int],
    inputs: list[int],
    weight: list[int],
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    wanted: list[bool],
    **others: Any,
) -> int:
    """Each gradient takes the products of the forward pass: with inputs and output, or weight and output swapped."""
    return (wanted[0] + wanted[1]) * conv_flop_count(inputs, weight, output, transposed)


def _attention(query: list[int], key: list[int], value: list[int], *rest: Any, **others: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    by_output: list[int], query: list[int], key: list[int], value: list[int], *rest: Any, **others: Any
) -> int:
    return sdpa_backward_flop_count(by_output, query, key, value)


# Arguments are shapes where the operator has tensors. torch has no formula for some of these, and counts the weight
# gradient of a grouped convolution once for each group.
OPERATION_FORMULAS = flop_registry | {
    operator: shape_wrapper(formula)
    for operator, formula in {
        torch.ops.aten.addmm_: _product_in_place,
        torch.ops.aten.baddbmm_: _product_in_place,
        torch.ops.aten.convolution_backward: _convolution_backward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }.items()
}


# -- memory ----------------------------------------------------------------------------------------------------------


def measure_memory(step: Step) -> MemoryUse:
    """Run a step that has been run before, so that the optimizer has its state, and measure memory by kind.

    Inputs are not counted.
    """
    parameters = list(step.model.parameters())
    activations, gradients = set(), set()
    with LiveMemory() as memory:
        for name, phase in step.phases.items():
            phase()
            if name == "forward":
                activations = memory.live()
            elif name == "backward":
                gradients = memory.numbers([parameter.grad for parameter in parameters])
    state = {} if step.optimizer is None else dict(step.optimizer.state)
    lasting = {"parameters": tensor_bytes(parameters), "optimizer_state": tensor_bytes(list(state.values()))}
    return MemoryUse(
        **lasting,
        gradients=memory.size(gradients),
        activations=memory.size(activations),
        temporary=memory.peak(without=activations | gradients),
        peak=sum(lasting.values()) + memory.peak(),
    )
