"""What a training will need, before it is started: what `mixlm plan` shows.

Parameters, gradients and the optimizer's moments are shares of known sizes (`training.sharding` says how each engine
spreads them). All else that a step keeps alive is found by running one on torch's FakeTensors, which have shapes and
no content: it takes no memory, whatever the size of the model. It grows with the rows of the batch along straight
lines, for which a few such steps are enough. The peak is the largest sum of both at any moment of a step.
docs/planning.md says how near that comes, and `probing` measures it.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForPreTraining, PreTrainedConfig

from .kernels import TOKENS_PER_BLOCK
from .live_memory import LiveMemory
from .profiling import random_batch
from .training.arguments import PretrainingArguments, TrainingArguments, cuts_parameters
from .training.batch_size import MOST_ROWS
from .training.optimization import OptimizerSettings, orthogonalized
from .training.precision import autocast
from .training.sharding import sharding_units

BYTES = 4  # of a number in a parameter, gradient or moment: float32, whatever the precision of the products


class Setting(NamedTuple):
    """How a model is to be trained.

    Args:
        zero, sharding_backend, auto_wrap: as in `TrainingArguments`.
        ranks: processes that train together.
        precision: "fp32", "bf16" or "fp16".
        accumulates: whether an optimizer step has several forward passes.
        device: "cpu" or "cuda".
        masked_share: of the tokens that are to be predicted.
        muon: whether the layers' matrices are updated by Muon.
    """

    zero: int = 0
    sharding_backend: str = "torch"
    auto_wrap: bool = False
    ranks: int = 1
    precision: str = "fp32"
    accumulates: bool = False
    device: str = "cpu"
    masked_share: float = PretrainingArguments.mlm_probability
    muon: bool = False

    def training_arguments(self, **fields: Any) -> TrainingArguments:
        """Those of a training with this setting, and other fields.

        Raises:
            UserError: no training can have it.
        """
        return TrainingArguments(
            zero=self.zero,
            sharding_backend=self.sharding_backend,
            auto_wrap=self.auto_wrap,
            bf16=self.precision == "bf16",
            fp16=self.precision == "fp16",
            muon=self.muon,
            **fields,
        )

    @property
    def is_fully_sharded(self) -> bool:
        """Whether every parameter is cut into as many pieces as there are ranks (see `sharding.build_engine`)."""
        return self.ranks > 1 and cuts_parameters(self.zero, self.sharding_backend, self.auto_wrap)

    @property
    def is_wrapped(self) -> bool:
        """Whether blocks of the model are gathered and freed one at a time."""
        return self.is_fully_sharded and self.auto_wrap


class Use(NamedTuple):
    """Bytes of a rank at one moment of a step, by kind.

    Args:
        moment: "start" (before the first step), "forward", "backward", "reduce" or "update".
        parameters, gradients, optimizer: what the rank keeps of each.
        activations: what the forward pass keeps for the backward pass, and results that live for a short time, also
            of Muon's update.
        exchange: whole parameters and gradients that are there only for a while, and buffers to send and receive.
    """

    moment: str
    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    exchange: int = 0

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self[1:])


# -- a step without content ------------------------------------------------------------------------------------------


class Parameter(NamedTuple):
    """Of a parameter what counts here.

    Args:
        shape: its own.
        unit: the number of its sharding unit; the root has the last.
        group: the number of its group in the optimizer.
        moments: how many numbers the optimizer keeps for each of it: 2 of AdamW, 1 of Muon.
    """

    shape: torch.Size
    unit: int
    group: int
    moments: int

    @property
    def size(self) -> int:
        """Bytes."""
        return BYTES * self.shape.numel()


class Step(NamedTuple):
    """What a step of one process keeps alive beside parameters, moments and complete gradients.

    Args:
        rows: of its batch.
        parameters: of the model, in the optimizer's order.
        forward: bytes, the most at any time of the forward pass.
        backward: in the order in which gradients are completed, for each the number of its parameter, and the most
            bytes since the one before.
        update: bytes, the most that Muon needs for a matrix; AdamW needs none.
    """

    rows: int
    parameters: list[Parameter]
    forward: int
    backward: list[tuple[int, int]]
    update: int = 0


def simulate_step(config: PreTrainedConfig, rows: int, length: int, setting: Setting) -> Step:
    """Run a pretraining step on tensors without content.

    Args:
        config: of the model.
        rows, length: of the batch, all real tokens; for ICT of the contexts too.
        setting: of it counts what the step of one process depends on: precision, device, what is to be predicted,
            which optimizer updates, and whether blocks are wrapped, for then the plain kernels run.
    """
    config = type(config).from_dict(config.to_dict())
    on_cpu = setting.device == "cpu"
    if setting.is_wrapped or (config.kernels == "auto" and not on_cpu):
        config.kernels = "plain"
    with ExitStack() as stack:
        # The device is a CPU, for torch may have been built without CUDA. What differs there is said by hand.
        stack.enter_context(FakeTensorMode())
        stack.enter_context(_WithoutContent(setting))
        if not on_cpu:
            stack.enter_context(mock.patch("mixlm.kernels.draws_from_seed", return_value=False))
        for module in ("modeling_mixlm", "modeling_switch"):
            # A new model is bare; but the parameters have another class, and so the fused kernels would not run.
            stack.enter_context(mock.patch(f"mixlm.{module}.is_bare", return_value=True))
        model = AutoModelForPreTraining.from_config(config, dtype=torch.float32).train()
        unit_of = {each: number for number, unit in enumerate(sharding_units(model)) for each in unit.parameters}
        optimizer = OptimizerSettings(learning_rate=0.0, weight_decay=0.0, epsilon=0.0, muon=setting.muon)
        groups = optimizer.groups(model)
        group_of = {each: number for number, group in enumerate(groups) for each in group["params"]}
        matrices = {each: group["matrices"] for group in groups if "matrices" in group for each in group["params"]}
        completed: list[int] = []
        moments: list[int] = []
        with LiveMemory() as memory:

            def complete(number: int, gradient: Tensor) -> None:
                completed.append(number)
                memory.disregard(gradient)
                moments.append(memory.moment())

            for number, parameter in enumerate(group_of):
                parameter.register_post_accumulate_grad_hook(
                    lambda parameter, number=number: complete(number, parameter.grad)
                )
            with autocast(setting.precision, torch.device("cpu")):
                loss = model(**random_batch(config, rows, length, setting.masked_share)).loss
            moments.append(memory.moment())
            loss.backward()
        forward, *backward = memory.peaks(moments)
        update = max((_update_memory(shape) for shape in set(matrices.values())), default=0)
    parameters = [
        Parameter(each.shape, unit_of[each], group, 1 if each in matrices else 2) for each, group in group_of.items()
    ]
    return Step(rows, parameters, forward, list(zip(completed, backward, strict=True)), update)


def _update_memory(shape: tuple[int, int, int]) -> int:
    """The most bytes that Muon has beside the moment while it updates a parameter that is so many matrices."""
    with LiveMemory() as memory, torch.no_grad():
        momentum = torch.empty(shape)
        orthogonalized(momentum)
    return memory.peak()


class _WithoutContent(TorchFunctionMode):
    """Answers the few questions of a forward pass that only content could answer: how many tokens are labelled; all
    are real, and each expert gets as many as any other.

    For CUDA it also does what differs there: dropout keeps a mask of one byte a number, and under autocast softmax
    and LayerNorm are computed in float32 (torch's documentation of autocast lists both).
    """

    def __init__(self, setting: Setting):
        super().__init__()
        self.on_cuda, self.in_16_bits = setting.device == "cuda", setting.precision != "fp32"
        self.masked_share, self.tokens_of_an_expert = setting.masked_share, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is Tensor.bincount:
            experts = kwargs["minlength"] - 1  # the last are the tokens that none gets
            self.tokens_of_an_expert = args[0].numel() // experts
            return args[0].new_empty(experts + 1)
        if function is Tensor.item:
            return self.tokens_of_an_expert
        if function is Tensor.__int__:  # a seed
            return 0
        if function is Tensor.__bool__:  # whether all tokens are real
            return True
        if function is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            hidden, labelled = args
            number = max(1, round(self.masked_share * labelled.numel()))
            return hidden.flatten(0, labelled.dim() - 1)[torch.zeros(number, dtype=torch.long)]
        if self.on_cuda and function is F.dropout:
            return torch.native_dropout(args[0], kwargs["p"], True)[0]
        if self.on_cuda and self.in_16_bits and function in (F.layer_norm, F.softmax, Tensor.softmax):
            args = (args[0].float(), *args[1:])
        return function(*args, **kwargs)


# -- how the engines spread it over the ranks ------------------------------------------------------------------------


def peak_use(step: Step, setting: Setting) -> Use:
    """What the rank that has most needs, at the moment when it is most; the optimizer's moments are there."""
    uses = _fully_sharded_uses(step, setting) if setting.is_fully_sharded else _whole_uses(step, setting)
    return max(uses, key=lambda use: use.total)


def _whole_uses(step: Step, setting: Setting) -> Iterator[Use]:
    """Of the engines that keep all parameters on every rank: one process, DistributedDataParallel, and
    ShardedDataParallel, which hands a gradient that is complete to its owner."""
    everything = _size(step.parameters, range(len(step.parameters)))
    by_owner = setting.ranks > 1 and setting.zero == 2
    # What comes of a parameter with its owner alone: its moments, and its gradient where that is handed over.
    own = max(
        owned(step.parameters, setting), key=lambda numbers: _size_of_moments(step.parameters, numbers, by_owner)
    )
    optimizer = _size_of_moments(step.parameters, own)
    in_buckets = setting.ranks > 1 and not by_owner
    # How often a gradient is there before it is complete: DistributedDataParallel's buckets always have room for it,
    # and what was accumulated lies beside them until it is exchanged.
    before = in_buckets + setting.accumulates
    kept = before * everything
    yield Use("forward", everything, kept, optimizer, step.forward)
    for number, alive in step.backward:
        yield Use("backward", everything, kept, optimizer, alive)
        after = number in own or not by_owner
        kept += (after - before) * step.parameters[number].size
    yield Use("update", everything, kept, optimizer, step.update)


def owned(parameters: list[Parameter], setting: Setting) -> list[set[int]]:
    """The numbers of the parameters that each rank updates; all of them where nothing is shared out.

    Both libraries go through the optimizer's groups and give each parameter to the rank that has least so far; torch
    begins with the largest of a group (ZeroRedundancyOptimizer._partition_parameters, fairscale's
    OSS.partition_parameters).
    """
    numbers = range(len(parameters))
    if setting.zero == 0 or setting.ranks == 1:
        return [set(numbers)]
    if setting.sharding_backend == "torch":
        numbers = sorted(numbers, key=lambda number: (parameters[number].group, -parameters[number].size))
    numbers_of: list[set[int]] = [set() for _ in range(setting.ranks)]
    sizes = [0] * setting.ranks
    for number in numbers:
        rank = sizes.index(min(sizes))
        numbers_of[rank].add(number)
        sizes[rank] += parameters[number].size
    return numbers_of


def _fully_sharded_uses(step: Step, setting: Setting) -> Iterator[Use]:
    """Of FSDP: every rank keeps its part of everything, and a unit is whole while it is used.

    torch gathers into one buffer and copies from there, keeping the buffer until the next unit in the forward pass; in
    the backward pass it gathers a unit ahead, and copies gradients into a buffer to reduce them, which it keeps until
    the next (torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py). fairscale gathers in place, but joins the
    gradients of a unit into one tensor, and copies that to reduce it. gloo, on a CPU, copies once more what it gathers
    or reduces.
    """
    by_torch, keeps = setting.sharding_backend == "torch", setting.zero == 2
    by_gloo = int(setting.device == "cpu")
    sizes = unit_sizes(step.parameters, setting)
    everything, root, largest = sum(sizes), sizes[-1], max(sizes[:-1], default=0)
    part = everything // setting.ranks
    # Only torch's engine can have Muon.
    matrices = [each for each in step.parameters if each.moments == 1]
    optimizer = 2 * part - sum(_cut(each, setting.ranks) for each in matrices) // setting.ranks
    largest_matrix = max((each.size for each in matrices), default=0)
    yield Use("start", everything + part)  # every rank makes the whole model, and then its part

    def use(moment: str, reduced: int, activations: int, exchange: int) -> Use:
        return Use(moment, part, reduced // setting.ranks, optimizer, activations, exchange)

    if not by_torch:
        buffers = by_gloo * largest
    elif setting.auto_wrap:
        buffers = (1 + by_gloo) * largest
    else:
        buffers = root
    gathered = everything if keeps else root + largest
    again = 0 if keeps else (2 if by_torch else 1 + by_gloo) * root  # the root is gathered for the backward pass
    whole = list(sizes) if setting.accumulates else [0] * len(sizes)  # gradients, until those of a unit are reduced
    yield use("forward", 0, step.forward, max(gathered + buffers, again) + sum(whole))

    buffers = (1 if keeps else 2) * largest if by_torch else largest
    units = _units(step.parameters, setting)
    to_come = Counter(units)  # gradients of each unit that are not complete
    reduced = 0
    for number, alive in step.backward:
        yield use("backward", reduced, alive, gathered + sum(whole) + buffers)
        unit = units[number]
        to_come[unit] -= 1
        if to_come[unit] == 0:
            whole[unit], reduced, gathered = 0, reduced + sizes[unit], gathered - (sizes[unit] if keeps else 0)
        elif not (by_torch and setting.accumulates):  # fairscale adds up the gradients of a unit as one tensor
            whole[unit] += step.parameters[number].size
    yield use("reduce", everything, 0, (2 if by_torch else 2 + by_gloo + setting.accumulates) * root)
    yield use("update", everything, step.update, largest_matrix)  # gathered into one buffer, copied from there


def _units(parameters: list[Parameter], setting: Setting) -> list[int]:
    """The number of the unit of each parameter; without `auto_wrap` there is one."""
    return [parameter.unit if setting.auto_wrap else 0 for parameter in parameters]


def unit_sizes(parameters: list[Parameter], setting: Setting) -> list[int]:
    """Bytes of each sharding unit, the root last, with what makes it divisible by the ranks: torch cuts each parameter
    along its first dimension, fairscale a unit as a whole."""
    ranks, units = setting.ranks, _units(parameters, setting)
    sizes = [0] * (1 + max(units))
    for parameter, unit in zip(parameters, units, strict=True):
        sizes[unit] += _cut(parameter, ranks) if setting.sharding_backend == "torch" else parameter.size
    return [-(-size // (BYTES * ranks)) * BYTES * ranks for size in sizes]


def _cut(parameter: Parameter, ranks: int) -> int:
    """Bytes of a parameter that is cut along its first dimension, with what makes that divisible by the ranks."""
    first = parameter.shape[0]
    return parameter.size // first * (-(-first // ranks) * ranks)


def _size(parameters: list[Parameter], numbers: Iterable[int]) -> int:
    """Bytes of the parameters with these numbers."""
    return sum(parameters[number].size for number in numbers)


def _size_of_moments(parameters: list[Parameter], numbers: Iterable[int], and_gradients: bool = False) -> int:
    """Bytes that the optimizer keeps of the parameters with these numbers, perhaps with their gradients."""
    return sum((parameters[number].moments + and_gradients) * parameters[number].size for number in numbers)


# -- the rows for which there is memory ------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What a setting needs.

    Args:
        setting: as it was given.
        rows: of a rank's batch.
        use: of the rank that has most, at the moment when it is most.
        most_rows: the largest batch that fits; 0 where a single row does not.
        numbers: in the parameters of the model.
    """

    setting: Setting
    rows: int
    use: Use
    most_rows: int
    numbers: int


def make_plans(
    config: PreTrainedConfig, length: int, settings: list[Setting], rows: int, budget: int
) -> Iterator[Plan]:
    """What each setting needs.

    Args:
        config: of the model.
        length: tokens of a row.
        settings: how it may be trained; they differ in nothing but zero.
        rows: of a rank's batch; 0 = as many as fit, or one where none does.
        budget: bytes that a rank may use.
    """
    steps: dict[bool, list[Step]] = {}
    block = -(-TOKENS_PER_BLOCK // length)  # the buffers of the fused kernels grow up to that
    for setting in settings:
        if setting.is_wrapped not in steps:
            sizes = sorted({1, block, 4 * block})
            steps[setting.is_wrapped] = [simulate_step(config, size, length, setting) for size in sizes]

        def use_of(rows: int, setting: Setting = setting) -> Use:
            return peak_use(at_rows(steps[setting.is_wrapped], rows), setting)

        most_rows = bisect_right(range(1, MOST_ROWS + 1), budget, key=lambda rows: use_of(rows).total)
        planned = rows or max(most_rows, 1)
        numbers = sum(each.shape.numel() for each in steps[setting.is_wrapped][0].parameters)
        yield Plan(setting, planned, use_of(planned), most_rows, numbers)


def at_rows(steps: list[Step], rows: int) -> Step:
    """A step of so many rows, by the straight line through two of `steps`: those around it, or the last two."""
    after = min(max(1, bisect_left(steps, rows, key=lambda step: step.rows)), len(steps) - 1)
    first, second = steps[after - 1], steps[after]

    def line(one: int, other: int) -> int:
        return one + (other - one) * (rows - first.rows) // (second.rows - first.rows)

    backward = [
        (number, line(one, other)) for (number, one), (_, other) in zip(first.backward, second.backward, strict=True)
    ]
    return first._replace(rows=rows, forward=line(first.forward, second.forward), backward=backward)
