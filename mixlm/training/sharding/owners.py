"""ZeRO stages 1 and 2, by parameter: each belongs to one rank, which keeps its moments and updates it."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .engine import STEP, Engine, this_rank


class OwnerEngine(Engine):
    """What the optimizers that give each parameter an owner have in common (ZeRO, arXiv:1910.02054, section 5.1).

    `self.optimizer.optim` is the owner's optimizer over its own parameters; after a step each sends them to all.
    """

    def owner_of(self, parameter: nn.Parameter) -> int:
        """The rank that updates the parameter."""
        return self.optimizer._param_to_rank[parameter]

    def _state_of(self, parameter: nn.Parameter, moments: tuple[str, ...]) -> dict[str, Tensor] | None:
        """As in `Engine._state_of`; the owner sends it to all."""
        state = self._optimizer_state().get(parameter)
        never = torch.tensor(-1.0, device=self.device)
        step = never if state is None else state[STEP].clone().to(self.device)
        dist.broadcast(step, src=self.owner_of(parameter))
        if step < 0:
            return None
        received = {name: torch.empty_like(parameter.data) if state is None else state[name] for name in moments}
        for moment in received.values():
            dist.broadcast(moment, src=self.owner_of(parameter))
        return {STEP: step, **received}

    def _optimizer_state(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        return self.optimizer.optim.state

    def _updates(self, parameter: nn.Parameter) -> bool:
        return self.owner_of(parameter) == this_rank()
