"""ZeRO 0 to 3 by fairscale or torch, behind one small interface (`engine.Engine`)."""

from torch import nn

from ..optimization import OptimizerSettings
from .engine import Engine, number_of_ranks, this_rank
from .units import Unit, describe, sharding_units

__all__ = ["Engine", "Unit", "build_engine", "describe", "number_of_ranks", "sharding_units", "this_rank"]


def build_engine(
    model: nn.Module, settings: OptimizerSettings, precision: str, zero: int, backend: str, units: list[Unit]
) -> Engine:
    """The engine for a ZeRO stage; on a single process, where there is nothing to share out, that of stage 0.

    Args:
        model: a PreTrainedModel on its device.
        settings: the optimizer's settings.
        precision: "fp32", "fp16" or "bf16".
        zero: 0 to 3. What the ranks share out: nothing; the optimizer's moments; gradients too; parameters too.
        backend: "fairscale" or "torch". Each is imported only if it is used.
        units: from `sharding_units`, for `--auto_wrap`; the root alone otherwise.
    """
    modules = [unit.module for unit in units[:-1]]
    if zero == 0 or number_of_ranks() == 1:
        return Engine(model, settings, precision)
    if backend == "torch":
        from .torch_engines import TorchFullySharded, TorchZero1

        if zero == 1:
            return TorchZero1(model, settings, precision)
        return TorchFullySharded(model, settings, precision, units=modules, reshard_after_forward=zero == 3)
    from .fairscale_engines import FairscaleFullySharded, FairscaleZero1, FairscaleZero2

    if zero == 1:
        return FairscaleZero1(model, settings, precision)
    if zero == 2 and not modules:
        return FairscaleZero2(model, settings, precision)
    if settings.muon:
        raise ValueError("fairscale's full sharding has no whole matrices, which Muon needs")
    return FairscaleFullySharded(model, settings, precision, units=modules, reshard_after_forward=zero == 3)
