"""torch's own sharding: ZeroRedundancyOptimizer, and FSDP2 (`fully_shard`)."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..optimization import Muon, OptimizerSettings
from .engine import number_of_ranks
from .fully_sharded import FullyShardedEngine
from .owners import OwnerEngine

# Nothing is done in place to what a unit returns: a model in units keeps to its plain kernels.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


class TorchZero1(OwnerEngine):
    """ZeRO-1: parameters and gradients on every rank, moments with their owner."""

    def _prepare(self, model: nn.Module, settings: OptimizerSettings) -> tuple[nn.Module, torch.optim.Optimizer]:
        optimizer = ZeroRedundancyOptimizer(settings.groups(model), settings.optimizer_class, **settings.options)
        return DistributedDataParallel(model, gradient_as_bucket_view=True), optimizer


class ShardedMuon(Muon):
    """Muon of parameters of which every rank has a part: to orthogonalize a matrix takes all of it."""

    def _orthogonalized(self, momentum: DTensor, shape: tuple[int, int, int]) -> DTensor:
        # Every rank gathers the momentum and does the same work, so that nothing needs to be sent back.
        whole = super()._orthogonalized(momentum.full_tensor(), shape)
        return distribute_tensor(whole, momentum.device_mesh, momentum.placements, src_data_rank=None)


class TorchFullySharded(FullyShardedEngine):
    """ZeRO-2 and 3: every parameter, its gradient and its moments are cut along the first dimension."""

    def _prepare(self, model: nn.Module, settings: OptimizerSettings) -> tuple[nn.Module, torch.optim.Optimizer]:
        mesh = init_device_mesh(self.device.type, (number_of_ranks(),))
        for module in (*self.units, model):
            fully_shard(module, mesh=mesh, reshard_after_forward=self.reshard_after_forward)
        self.parameters = dict(model.named_parameters())  # sharded ones have taken the place of those that were there
        optimizer_class = ShardedMuon if settings.muon else settings.optimizer_class
        return model, optimizer_class(settings.groups(model), **settings.options)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """As in `Engine.no_sync`."""
        self.module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.module.set_requires_gradient_sync(True)

    def gradients(self) -> list[Tensor]:
        """As in `Engine.gradients`: this rank's parts."""
        return [gradient.to_local() for gradient in super().gradients()]

    def _whole(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        return part.full_tensor()

    def _part(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        # Every rank has the whole and keeps its part: nothing needs to be sent.
        return distribute_tensor(
            whole.view(parameter.shape), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
