"""ZeRO stages 2 and 3, by entry: every parameter, its gradient and its moments are cut among all ranks."""

from torch import nn

from ..optimization import OptimizerSettings
from .engine import Engine


class FullyShardedEngine(Engine):
    """What the engines that cut every parameter into as many pieces as there are ranks have in common.

    Args:
        units: modules whose parameters are gathered and freed together; the rest of the model is one more unit.
        reshard_after_forward: free the gathered parameters after the forward pass, and gather them again for the
            backward pass (ZeRO-3), rather than keep them (ZeRO-2).
    """

    shares_out_gradients = True

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings,
        precision: str,
        *,
        units: list[nn.Module],
        reshard_after_forward: bool,
    ):
        self.units, self.reshard_after_forward = units, reshard_after_forward
        super().__init__(model, settings, precision)
