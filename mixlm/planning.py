"""What a training will need before it is started: what `mixlm plan` shows.

A step of the whole model runs on tensors without content (torch's FakeTensor), which take no memory, whatever the size
of the model, and what is alive at each time is written down. How the engines of `training.sharding` spread parameters,
gradients and moments over the ranks is arithmetic on top of that. docs/planning.md says how near it comes.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForPreTraining, PreTrainedConfig

from .configuration import MixLMConfig, MixLMSwitchConfig, preset_names
from .data.batching import Position
from .errors import UserError
from .profiling import MASKED_SHARE, random_batch
from .training.arguments import TrainingArguments
from .training.loop import train
from .training.memory import MemoryMeter
from .training.objectives import Batch, InverseClozeObjective, SentenceOrderObjective
from .training.optimization import AdamW
from .training.precision import autocast
from .training.run import prepare_run
from .training.sharding import sharding_units

# The share of a device's memory that is left to libraries, fragmentation and the buffers within operators.
MARGIN = 0.1
BYTES = 4  # of a number in a parameter, gradient or moment: float32, whatever the precision of the products
MOMENTS = 2  # of AdamW, for each parameter


class Setting(NamedTuple):
    """How a model is to be trained.

    Args:
        zero, sharding_backend, auto_wrap: as in `TrainingArguments`.
        ranks: processes that train together.
        precision: "fp32", "bf16" or "fp16".
        device: "cpu" or "cuda".
    """

    zero: int = 0
    sharding_backend: str = "torch"
    auto_wrap: bool = False
    ranks: int = 1
    precision: str = "fp32"
    device: str = "cuda"

    @property
    def is_fully_sharded(self) -> bool:
        """Whether every parameter is cut into as many pieces as there are ranks (see `sharding.build_engine`)."""
        by_owner = self.sharding_backend == "fairscale" and not self.auto_wrap
        return self.ranks > 1 and self.zero >= (3 if by_owner else 2)

    @property
    def wraps_layers(self) -> bool:
        """Whether parts of the model are units of their own."""
        return self.is_fully_sharded and self.auto_wrap


class Use(NamedTuple):
    """Bytes of one rank at one time, by kind.

    Args:
        when: in the step.
        parameters, gradients, moments: what the rank keeps of them.
        activations: what the forward pass keeps for the backward pass, with the inputs.
        working: all else: results that are needed for a short time, gradients on their way to their owners, gathered
            parameters.
    """

    when: str
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
    """What a setting needs.

    Args:
        use: when it is largest.
        most_rows: of a rank, for which there is memory; 0 where there is not even for one.
    """

    use: Use
    most_rows: int


# -- a step without memory -------------------------------------------------------------------------------------------


class Parameter(NamedTuple):
    """Of a parameter what counts here.

    Args:
        shape: its own.
        unit: the number of its sharding unit; the root has the last.
        group: the number of its group in AdamW.
    """

    shape: torch.Size
    unit: int
    group: int

    @property
    def size(self) -> int:
        """Bytes."""
        return BYTES * self.shape.numel()


class Stretch(NamedTuple):
    """A part of a step: the forward pass, or of the backward pass what ends when a parameter's gradient is complete.

    Args:
        activations, temporary: bytes, when both together are most. Parameters and their gradients are in neither.
        growing: numbers of the parameters whose gradients are there but were not complete before.
        complete: number of the parameter whose gradient is complete at its end; none for the forward pass.
    """

    activations: int
    temporary: int
    growing: frozenset[int] = frozenset()
    complete: frozenset[int] = frozenset()


class Step(NamedTuple):
    """A training step of one process.

    Args:
        rows: of its batch.
        parameters: of the model, in AdamW's order.
        stretches: in their order.
        repeats: whether a layer's module is called several times in the forward pass.
    """

    rows: int
    parameters: list[Parameter]
    stretches: list[Stretch]
    repeats: bool


def simulate_step(config: PreTrainedConfig, rows: int, length: int, setting: Setting) -> Step:
    """Run a pretraining step on tensors without content.

    Args:
        config: of the model.
        rows, length: of the batch: real tokens, 15% of them to be predicted; for ICT contexts of the same shape too.
        setting: of it counts what the step of one process depends on: precision, device, and whether layers are
            wrapped, for then the plain kernels run.
    """
    config = type(config).from_dict(config.to_dict())
    if setting.wraps_layers or (config.kernels == "auto" and setting.device != "cpu"):
        config.kernels = "plain"
    with ExitStack() as stack:
        # The device is always a CPU, for torch may have been built without CUDA. `_WithoutContent` does what differs.
        stack.enter_context(FakeTensorMode())
        stack.enter_context(_WithoutContent(setting))
        if setting.device != "cpu":
            stack.enter_context(mock.patch("mixlm.kernels.draws_from_seed", lambda hidden: False))
        model = AutoModelForPreTraining.from_config(config, dtype=torch.float32).train()
        units = enumerate(sharding_units(model))
        unit_of = {parameter: number for number, unit in units for parameter in unit.parameters}
        groups = enumerate(AdamW(learning_rate=0.0, weight_decay=0.0, epsilon=0.0).groups(model))
        parameters = {
            parameter: Parameter(parameter.shape, unit_of[parameter], number)
            for number, group in groups
            for parameter in group["params"]
        }
        with _Memory(list(parameters)) as memory:
            with autocast(setting.precision, torch.device("cpu")):
                loss = model(**random_batch(config, rows, length)).loss
            memory.end_forward()
            loss.backward()
    repeats = config.layer_group > 1 or config.pretraining_objective == "ict"
    return Step(rows, list(parameters.values()), memory.stretches(), repeats)


class _WithoutContent(TorchFunctionMode):
    """Answers for the few questions of a forward pass that only content could answer: of the tokens 15% are labelled,
    all are real, and each expert gets as many as any other.

    For CUDA it also does what differs there: dropout keeps a mask of one byte a number, and under autocast softmax
    and LayerNorm are computed in float32 (torch's documentation of autocast lists both).
    """

    def __init__(self, setting: Setting):
        super().__init__()
        self.on_cuda, self.in_16_bits = setting.device != "cpu", setting.precision != "fp32"
        self.routed = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is Tensor.bincount:
            self.routed = args[0].numel()
            return args[0].new_empty(kwargs["minlength"])
        if function is Tensor.tolist:
            return [self.routed // len(args[0])] * len(args[0])
        if function is Tensor.__int__:  # a seed
            return 0
        if function is Tensor.__bool__:  # whether all tokens are real
            return True
        if function is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            hidden, labelled = args
            number = max(1, round(MASKED_SHARE * labelled.numel()))
            return hidden.flatten(0, labelled.dim() - 1)[torch.zeros(number, dtype=torch.long)]
        if self.on_cuda and function is F.dropout:
            return torch.native_dropout(args[0], args[1], True)[0]
        if self.on_cuda and self.in_16_bits and function in (F.layer_norm, F.softmax, Tensor.softmax):
            args = (args[0].float(), *args[1:])
        return function(*args, **kwargs)


class _Memory(TorchDispatchMode):
    """Keeps account of the memory that operators would make, and of when it would be freed again.

    Args:
        parameters: whose gradients are told apart from all other memory.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        super().__init__()
        # What happens: ("made", number of a storage, bytes), ("freed", number, bytes), ("forward ended", 0, 0),
        # ("complete", number of a parameter, number of its gradient's storage).
        self._events: list[tuple[str, int, int]] = []
        self._numbers: dict[int, int] = {}  # address of a live storage -> its number
        for number, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(lambda parameter, number=number: self._end(number, parameter))

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten.add.Tensor and torch._C._current_graph_task_id() != -1:
            # Gradients that meet. Without a dispatch mode torch adds them in place.
            operator = torch.ops.aten.add_.Tensor
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = operator(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in given and storage._cdata not in self._numbers:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        number, size, address = len(self._events), storage.nbytes(), storage._cdata
        self._numbers[address] = number
        self._events.append(("made", number, size))

        def free():
            del self._numbers[address]
            self._events.append(("freed", number, size))

        weakref.finalize(storage, free).atexit = False

    def end_forward(self) -> None:
        """What is made from now on belongs to the backward pass."""
        self._events.append(("forward ended", 0, 0))

    def _end(self, number: int, parameter: nn.Parameter) -> None:
        self._events.append(("complete", number, self._numbers[parameter.grad.untyped_storage()._cdata]))

    def stretches(self) -> list[Stretch]:
        """What was written down, as stretches."""
        parameter_of = {storage: number for kind, number, storage in self._events if kind == "complete"}
        alive = {"activations": 0, "temporary": 0}
        most, growing, of_forward = (0, 0), set(), set()
        stretches: list[Stretch] = []
        for kind, number, size in self._events:
            if kind == "forward ended":
                # In a forward pass memory grows until its end, near enough.
                stretches.append(Stretch(alive["activations"], sum(most) - alive["activations"]))
                most = (alive["activations"], 0)
            elif kind == "complete":
                stretches.append(Stretch(*most, frozenset(growing), frozenset([number])))
                growing.discard(number)
                most = tuple(alive.values())
            elif number in parameter_of:
                if kind == "made":
                    growing.add(parameter_of[number])
            else:
                if not stretches:
                    of_forward.add(number)
                where = "activations" if number in of_forward else "temporary"
                alive[where] += size if kind == "made" else -size
                if sum(alive.values()) > sum(most):
                    most = tuple(alive.values())
        return stretches


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """The memory of all tensors in nested values; empty ones have none."""
    storages = (value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor))
    return (storage for storage in storages if storage.nbytes())


# -- how the engines spread it over the ranks ------------------------------------------------------------------------


def uses(step: Step, setting: Setting) -> list[Use]:
    """Bytes of the rank that has most, at the times when a training step may need most.

    They are each stretch of the step, the gathering of whole parameters before a backward pass, the reduction of whole
    gradients after it, and AdamW's update; the moments are there from the first step on.
    """
    return _fully_sharded_uses(step, setting) if setting.is_fully_sharded else _whole_uses(step, setting)


def _whole_uses(step: Step, setting: Setting) -> list[Use]:
    """Of the engines that keep all parameters on every rank."""
    everything = _size(step.parameters)
    own = set(range(len(step.parameters)))
    if setting.ranks > 1 and setting.zero > 0:
        own = max(owned(step.parameters, setting), key=lambda numbers: _size(step.parameters, numbers))
    moments = MOMENTS * _size(step.parameters, own)
    in_buckets = setting.ranks > 1 and setting.zero < 2
    found = []
    complete: frozenset[int] = frozenset()
    for stretch in step.stretches:
        growing = _size(step.parameters, stretch.growing)
        if in_buckets:
            # DistributedDataParallel's buckets always have room for all gradients; one that is complete is copied in.
            gradients, working = everything, growing
        elif setting.ranks > 1:
            # What is complete goes to its owner.
            gradients, working = _size(step.parameters, complete & own), growing
        else:
            gradients, working = _size(step.parameters, complete) + growing, 0
        when = "backward" if found else "forward"
        working += stretch.temporary
        found.append(Use(when, everything, gradients, moments, stretch.activations, working))
        complete |= stretch.complete
    gradients = everything if in_buckets else _size(step.parameters, own)
    return [*found, Use("update", everything, gradients, moments)]


def owned(parameters: list[Parameter], setting: Setting) -> list[set[int]]:
    """The numbers of the parameters that each rank updates under ZeRO-1 and fairscale's ZeRO-2.

    Both libraries go through AdamW's groups and give each parameter to the rank that has least so far; torch begins
    with the largest of a group (ZeroRedundancyOptimizer._partition_parameters, fairscale's OSS.partition_parameters).
    """
    numbers_of: list[set[int]] = [set() for _ in range(setting.ranks)]
    sizes = [0] * setting.ranks
    numbers = range(len(parameters))
    if setting.sharding_backend == "torch":
        numbers = sorted(numbers, key=lambda number: (parameters[number].group, -parameters[number].size))
    for number in numbers:
        rank = sizes.index(min(sizes))
        numbers_of[rank].add(number)
        sizes[rank] += parameters[number].size
    return numbers_of


def _fully_sharded_uses(step: Step, setting: Setting) -> list[Use]:
    """Of FSDP: every rank keeps its part of everything, and a unit is whole while it is used.

    torch gathers into one buffer and copies from there, keeping the buffer until the next unit in the forward pass; in
    the backward pass it gathers a unit ahead, and copies gradients into a buffer to reduce them, which it keeps until
    the next (torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py). fairscale gathers in place, but joins the
    gradients of a unit into one tensor, and copies that to reduce it. gloo, on a CPU, copies once more what it gathers
    or reduces.
    """
    by_torch, keeps = setting.sharding_backend == "torch", setting.zero == 2
    by_gloo = int(setting.device == "cpu")
    unit_of = [parameter.unit if setting.auto_wrap else 0 for parameter in step.parameters]
    sizes = unit_sizes(step.parameters, setting)
    everything, root, largest = sum(sizes), sizes[-1], max(sizes[:-1], default=0)
    part = everything // setting.ranks
    decays = 0 if by_torch else part  # FairscaleFullySharded.decays

    def use(when: str, stretch: Stretch, reduced: int, working: int) -> Use:
        working += stretch.temporary + decays
        return Use(when, part, reduced // setting.ranks, MOMENTS * part, stretch.activations, working)

    gathered = everything if keeps else root + largest
    if not by_torch:
        buffers = by_gloo * largest
    elif setting.auto_wrap:
        buffers = (1 + by_gloo) * largest
    else:
        buffers = root
    forward, *backward = step.stretches
    found = [use("forward", forward, 0, gathered + buffers)]
    if not keeps:
        copies = 1 + (1 if by_torch else by_gloo)
        found.append(use("gathering", forward._replace(temporary=0), 0, copies * root))

    numbers_of = [{number for number, of in enumerate(unit_of) if of == unit} for unit in range(len(sizes))]
    complete: set[int] = set()
    held: set[int] = set()  # gradients that are whole: until those of their unit are complete, and reduced together
    if by_torch:
        buffers = (1 if keeps else 2) * largest
    else:
        buffers = (2 if step.repeats else 1) * largest
    for stretch in backward:
        held |= stretch.growing
        waiting = sum(size for size, numbers in zip(sizes, numbers_of, strict=True) if not numbers <= complete)
        gathered = waiting if keeps else root + largest
        working = gathered + buffers + _size(step.parameters, held)
        found.append(use("backward", stretch, everything - waiting, working))
        complete |= stretch.complete
        held = {number for number in held if not numbers_of[unit_of[number]] <= complete}

    done = Stretch(activations=0, temporary=0)
    found.append(use("reducing", done, everything - root, (2 if by_torch else 3) * root))
    decaying = 0 if by_torch else 2 * max(sizes) // setting.ranks
    return [*found, use("update", done, everything, decaying)]


def unit_sizes(parameters: list[Parameter], setting: Setting) -> list[int]:
    """Bytes of each sharding unit, the root last, with what makes it divisible by the ranks: torch cuts each parameter
    along its first dimension, fairscale a unit as a whole."""
    ranks = setting.ranks
    sizes = [0] * (1 + max(parameter.unit for parameter in parameters) if setting.auto_wrap else 1)
    for parameter in parameters:
        first, size = parameter.shape[0], parameter.size
        padded = size // first * (-(-first // ranks) * ranks) if setting.sharding_backend == "torch" else size
        sizes[parameter.unit if setting.auto_wrap else 0] += padded
    return [-(-size // (BYTES * ranks)) * BYTES * ranks for size in sizes]


def _size(parameters: list[Parameter], numbers: Iterable[int] | None = None) -> int:
    """Bytes of all parameters, or of those with these numbers."""
    if numbers is None:
        return sum(parameter.size for parameter in parameters)
    return sum(parameters[number].size for number in numbers)


def make_plan(first: Step, second: Step, setting: Setting, device_memory: int) -> Plan:
    """What a setting needs for the rows of `first`, and how many rows there is memory for.

    Args:
        first, second: the step with two numbers of rows. At each time memory is a straight line in the rows, so that
            the peak is the highest of several lines.
        setting: as both were simulated with.
        device_memory: bytes of a rank, of which `MARGIN` is left free.
    """
    budget = int((1 - MARGIN) * device_memory)
    found = uses(first, setting)
    most_rows = []
    for one, other in zip(found, uses(second, setting), strict=True):
        by_row = (other.total - one.total) / (second.rows - first.rows)
        if by_row > 0:
            most_rows.append(max(0, int(first.rows + (budget - one.total) / by_row)))
        elif one.total > budget:
            most_rows.append(0)
    return Plan(max(found, key=lambda use: use.total), min(most_rows))


# -- the same, measured ----------------------------------------------------------------------------------------------

WARM_UP_STEPS = 2  # libraries are loaded, the moments made, DistributedDataParallel's buckets made anew
TIMEOUT_SECONDS = 3600


class Measurement(NamedTuple):
    """What a training showed.

    Args:
        peak_bytes: by which the memory of the rank that has most grew from before the model was made.
        tokens_per_second: of all ranks together.
    """

    peak_bytes: int
    tokens_per_second: float


def measure(config: PreTrainedConfig, rows: int, length: int, setting: Setting, steps: int) -> Measurement:
    """Train on random ids on this machine, with the loop of a real run, in processes of their own.

    Args:
        config: of the model.
        rows, length: of a rank's batch.
        setting: on which device is for this machine to say.
        steps: how many to measure.

    Raises:
        UserError: the training failed, for want of memory perhaps.
    """
    # Freed memory goes back at once, so that a peak is what is in use.
    memory = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(setting.ranks)]
    with tempfile.TemporaryDirectory(prefix="mixlm-plan-") as folder:
        config.to_json_file(Path(folder) / "config.json", use_diff=False)
        task = json.dumps({"rows": rows, "length": length, "steps": steps, "setting": setting._asdict()})
        try:
            done = subprocess.run(
                [sys.executable, *launch, "-m", "mixlm.planning", folder, task],
                env={"OMP_NUM_THREADS": "1", **os.environ, **memory},
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(f"the measurement has no end after {TIMEOUT_SECONDS:,} seconds") from error
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "Error" in line and "ChildFailed" not in line]
            raise UserError(f"the measurement failed: {errors[0] if errors else f'exit code {done.returncode}'}")
        return Measurement(*json.loads((Path(folder) / "measured.json").read_text("utf-8")))


def main(folder: str, task: str) -> None:
    """A process of `measure`: trains a tiny model, which loads every library, and then that of the task."""
    asked = json.loads(task)
    setting = Setting(**asked["setting"])
    config = read_config(Path(folder) / "config.json")
    tiny = type(config).from_preset("mixlm-tiny" if isinstance(config, MixLMConfig) else "mixlm-switch-tiny")
    tiny.pretraining_objective = config.pretraining_objective
    _train(Path(folder), "warm-up", tiny, 2, 16, 1, setting)
    measured = _train(Path(folder), "measured", config, asked["rows"], asked["length"], asked["steps"], setting)
    if int(os.environ["RANK"]) == 0:
        (Path(folder) / "measured.json").write_text(json.dumps(measured), "utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()


def _train(
    folder: Path, name: str, config: PreTrainedConfig, rows: int, length: int, steps: int, setting: Setting
) -> Measurement:
    arguments = TrainingArguments(
        model_name=name,
        output_dir=str(folder),
        train_batch_size=rows,
        num_steps=sys.maxsize,  # the batches end sooner, so that nothing is saved
        zero=setting.zero,
        sharding_backend=setting.sharding_backend,
        auto_wrap=setting.auto_wrap,
        bf16=setting.precision == "bf16",
        fp16=setting.precision == "fp16",
    )
    accelerator = prepare_run(arguments)
    memory = MemoryMeter(accelerator.device)
    gc.collect()
    before, peak, seconds = memory.level(), 0, 0.0

    def batches(position: Position) -> Iterator[tuple[Position, list[Batch]]]:
        nonlocal peak, seconds
        for number in range(WARM_UP_STEPS + steps):
            if number == WARM_UP_STEPS:
                memory.restart()
                started = time.perf_counter()
            yield Position(batch=number + 1), [random_batch(config, rows, length)]
        peak, seconds = memory.peak() - before, time.perf_counter() - started

    objective = SentenceOrderObjective if config.pretraining_objective == "sop" else InverseClozeObjective
    model = AutoModelForPreTraining.from_config(config)
    train(model, objective, batches, arguments, accelerator, evaluate=lambda engine: {})
    peaks = accelerator.gather(torch.tensor([peak], device=accelerator.device))
    texts = 1 if config.pretraining_objective == "sop" else 2
    tokens = texts * rows * length * steps * accelerator.num_processes
    return Measurement(int(peaks.max()), tokens / seconds)


def read_config(name_or_file: str | Path) -> PreTrainedConfig:
    """The configuration of a preset or of a JSON file, whichever family it is of.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        fields = json.loads(Path(name_or_file).read_text("utf-8")) if Path(name_or_file).is_file() else {}
        is_switch = name_or_file in preset_names(MixLMSwitchConfig.model_type)
        is_switch |= isinstance(fields, dict) and fields.get("model_type") == MixLMSwitchConfig.model_type
        return (MixLMSwitchConfig if is_switch else MixLMConfig).from_preset(name_or_file)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error


if __name__ == "__main__":
    main(*sys.argv[1:])
