"""fairscale's sharding: OSS, ShardedDataParallel and FullyShardedDataParallel.

fairscale is no longer developed. What it needs in order to be right with today's torch is in this file alone:

* ShardedDataParallel silently drifts away from DistributedDataParallel when gradients that lie in its buckets are set
  to None, which torch's `zero_grad` does by default. Here it has no buckets.
* FullyShardedDataParallel makes one flat parameter of all those in a unit, so that AdamW could not tell which are to
  decay. Here the engine does that part of AdamW. (Left unflattened, the parameters of a unit with two outputs, as an
  attention with its scores has, are freed before the backward pass through the second.)
* FullyShardedDataParallel needs CUDA streams. `_on_cpu` stands in for them where there are none.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.data_parallel import FullyShardedDataParallel, ShardedDataParallel, fully_sharded_data_parallel
from fairscale.optim import OSS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..optimization import OptimizerSettings
from .engine import number_of_ranks, this_rank
from .fully_sharded import FullyShardedEngine
from .owners import OwnerEngine

# What it calls has newer names in torch; a user can do nothing about it.
warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
warnings.filterwarnings(
    "ignore", message=r"`torch\.distributed\._(all_gather|reduce_scatter)_base` is a private function"
)


class FairscaleZero1(OwnerEngine):
    """ZeRO-1: parameters and gradients on every rank, moments with their owner."""

    def _prepare(self, model: nn.Module, settings: OptimizerSettings) -> tuple[nn.Module, torch.optim.Optimizer]:
        optimizer = OSS(settings.groups(model), settings.optimizer_class, **settings.options)
        return DistributedDataParallel(model, gradient_as_bucket_view=True), optimizer


class FairscaleZero2(OwnerEngine):
    """ZeRO-2: parameters on every rank, gradients and moments with their owner."""

    shares_out_gradients = True

    def _prepare(self, model: nn.Module, settings: OptimizerSettings) -> tuple[nn.Module, torch.optim.Optimizer]:
        optimizer = OSS(settings.groups(model), settings.optimizer_class, **settings.options)
        return ShardedDataParallel(
            model, optimizer, broadcast_buffers=False, reduce_buffer_size=0, warn_on_trainable_params_changed=False
        ), optimizer

    def gradients(self) -> list[Tensor]:
        """As in `Engine.gradients`: those of the parameters that this rank owns."""
        owned = (parameter for parameter in self.parameters.values() if self._updates(parameter))
        return [parameter.grad for parameter in owned if parameter.grad is not None]


class FairscaleFullySharded(FullyShardedEngine):
    """ZeRO-2 and 3: those of a unit lie in one flat parameter, which is cut into as many pieces as there are ranks."""

    def _prepare(self, model: nn.Module, settings: OptimizerSettings) -> tuple[nn.Module, torch.optim.Optimizer]:
        names = {parameter: name for name, parameter in self.parameters.items()}
        places = {
            (module, own): names[parameter]
            for module in model.modules()
            for own, parameter in module.named_parameters(recurse=False)
        }
        decayed = {names[parameter] for parameter in settings.groups(model)[0]["params"]}

        wrap = FullyShardedDataParallel if self.device.type == "cuda" else _CpuFullyShardedDataParallel
        options = {
            "reshard_after_forward": self.reshard_after_forward,
            "bucket_cap_mb": 0,  # buckets are handed over as matrices, which gloo refuses
            "compute_device": self.device,
        }
        for unit in self.units:
            _replace(model, unit, wrap(unit, **options))
        model = wrap(model, **options)

        self.parameters = dict(model.named_parameters())
        self.contents = {
            name: {
                places[module, own]: shape
                for (_, module, own), shape in zip(flat._param_infos, flat._param_shapes, strict=True)
            }
            for name, flat in self.parameters.items()
        }
        self.weight_decay = settings.weight_decay
        self.decaying = {name: self._entries_of(name, decayed) for name in self.parameters}
        return model, torch.optim.AdamW(self.parameters.values(), weight_decay=0.0, **settings.options)

    def _entries_of(self, name: str, wanted: set[str]) -> list[slice]:
        """Where in this rank's piece of a flat parameter those of the model lie that are `wanted`."""
        length = self.parameters[name].numel()
        piece, first, found = range(this_rank() * length, (this_rank() + 1) * length), 0, []
        for each, shape in self.contents[name].items():
            start, stop = max(first, piece.start), min(first + shape.numel(), piece.stop)
            if each in wanted and start < stop:
                found.append(slice(start - piece.start, stop - piece.start))
            first += shape.numel()
        return found

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """As in `Engine.step`. Weights decay by entry: a flat parameter holds some that do not."""
        for name, entries in self.decaying.items():
            for each in entries:
                self.parameters[name][each].mul_(1 - learning_rate * self.weight_decay)
        super().step(learning_rate)

    def no_sync(self) -> AbstractContextManager:
        """As in `Engine.no_sync`."""
        return self.module.no_sync()

    def _own(self, parameter: nn.Parameter) -> Tensor:
        # After an evaluation the whole parameter may still be in its place.
        return getattr(parameter, "_fp32_shard", parameter.data)

    def _whole(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        pieces = part.new_empty(number_of_ranks() * part.numel())
        dist.all_gather(list(pieces.chunk(number_of_ranks())), part)
        return pieces[: parameter._orig_size.numel()]  # without the padding

    def _part(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        size = -(-whole.numel() // number_of_ranks())
        padded = whole.new_zeros(size * number_of_ranks())
        padded[: whole.numel()] = whole.flatten()
        return padded[this_rank() * size :][:size].clone()


def _replace(model: nn.Module, unit: nn.Module, wrapped: nn.Module) -> None:
    """Put `wrapped` wherever `unit` is in the model."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children() names a child once
            if child is unit:
                parent._modules[name] = wrapped


# -- on a CPU --------------------------------------------------------------------------------------------------------


class _NoStream:
    """A CUDA stream where there is none: everything is done in the order in which it is asked for."""

    def wait_stream(self, other: "_NoStream") -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


_THE_STREAM = _NoStream()


class _TorchWithoutStreams:
    """The module `torch` as fairscale's FSDP sees it on a CPU: all of it, but with `_NoStream` for CUDA's streams."""

    cuda = SimpleNamespace(
        is_available=lambda: False, current_stream=lambda: _THE_STREAM, stream=lambda _: nullcontext()
    )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_record_stream = torch.Tensor.record_stream


def _record_stream_unless_on_cpu(tensor: Tensor, stream: Any) -> None:
    """`Tensor.record_stream`, which keeps memory from being given away too early; that of a CPU never is."""
    if tensor.device.type != "cpu":
        _record_stream(tensor, stream)


class _CpuFullyShardedDataParallel(FullyShardedDataParallel):
    """FullyShardedDataParallel on a CPU, over gloo: with streams that do nothing."""

    def __init__(self, module: nn.Module, **options: Any):
        fully_sharded_data_parallel.torch = _TorchWithoutStreams()
        torch.Tensor.record_stream = _record_stream_unless_on_cpu
        super().__init__(module, **options)

    def _setup_streams(self) -> None:
        super()._setup_streams()
        self._streams.update(dict.fromkeys(("fp32_to_fp16", "all_gather", "post_backward"), _THE_STREAM))
