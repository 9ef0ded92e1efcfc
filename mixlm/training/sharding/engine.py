"""What a sharding engine is to the training loop.

An engine says how the parameters, their gradients and the optimizer's moments are spread over the ranks, and hides it:
the loop calls the engine as it would call the model, and what goes to the disk is whole tensors by their names in the
model. So a checkpoint of one engine, precision and number of ranks goes on under any other.

The engine of this file keeps everything on every rank. The others, one file per library, override what they do
differently.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..optimization import OptimizerSettings, matrices_of
from ..precision import autocast

# Of a parameter that AdamW updates; Muon's have the first.
MOMENTS = ("exp_avg", "exp_avg_sq")
# A step counter is kept a parameter, as torch does: one that had no gradient yet has none.
STEP = "step"
ENTRIES_OF_A_NORM = 2**16


def number_of_ranks() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def this_rank() -> int:
    """The number of this process among them."""
    return dist.get_rank() if dist.is_initialized() else 0


class Engine:
    """The whole model on every rank: ZeRO stage 0, or a single process.

    Args:
        model: a PreTrainedModel on its device. It is the engine's from now on: a sharding engine takes its parameters
            apart. The parameters of rank 0 count.
        settings: the optimizer's settings.
        precision: "fp32", "fp16" or "bf16": of the matrix products of a forward pass. Parameters, gradients and
            moments are as the model is, and so is everything in the checkpoint.
    """

    # Whether a rank has a part of all gradients after a backward pass, so that a norm is a sum over ranks.
    shares_out_gradients = False

    def __init__(self, model: nn.Module, settings: OptimizerSettings, precision: str):
        self.config, self.precision = model.config, precision
        self.device = next(model.parameters()).device
        if number_of_ranks() > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.data, src=0)
        # What is trained. A tied parameter has one name, that of its first place.
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        # Which parameters of the model each of these holds, and their shapes: itself, unless an engine joins several.
        self.contents = {name: {name: parameter.shape} for name, parameter in self.parameters.items()}
        muon = matrices_of(model) if settings.muon else {}
        self.with_one_moment = {name for name, parameter in self.parameters.items() if parameter in muon}
        self.module, self.optimizer = self._prepare(model, settings)

    def _prepare(self, model: nn.Module, settings: OptimizerSettings) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The module to call, and the optimizer over what this rank has of the parameters."""
        optimizer = settings.build(model)
        if number_of_ranks() > 1:
            model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        return model, optimizer

    # -- a step --

    def __call__(self, **batch: Any) -> Any:
        """The model's forward pass in the engine's precision."""
        with autocast(self.precision, self.device):
            return self.module(**batch)

    def train(self, mode: bool = True) -> None:
        """As `nn.Module.train`."""
        self.module.train(mode)

    def eval(self) -> None:
        """As `nn.Module.eval`."""
        self.train(False)

    def no_sync(self) -> AbstractContextManager:
        """Where a backward pass adds to this rank's own gradients, and the ranks do not exchange them yet.

        The backward pass that does exchange them leaves their mean over the ranks.
        """
        return self.module.no_sync() if number_of_ranks() > 1 else nullcontext()

    def gradients(self) -> list[Tensor]:
        """The gradients with which this rank updates parameters, as plain tensors."""
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """The norm of the gradient of all parameters, the same number on every rank.

        In float32, the squares of a million entries add up to four digits. Norms of pieces are joined in float64, so
        that engines which cut the gradient in other places agree.
        """
        pieces = [piece for gradient in self.gradients() for piece in gradient.flatten().split(ENTRIES_OF_A_NORM)]
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        if pieces:
            squares += torch.stack(torch._foreach_norm(pieces)).double().square().sum()
        if self.shares_out_gradients:
            dist.all_reduce(squares)
        return float(squares.sqrt())

    @torch.no_grad()
    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients."""
        gradients = self.gradients()
        if gradients and factor != 1:
            torch._foreach_mul_(gradients, factor)

    def step(self, learning_rate: float) -> None:
        """Update the parameters, and forget the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """Free the gradients, after a step or instead of one."""
        self.optimizer.zero_grad(set_to_none=True)

    def forget_moments(self) -> None:
        """The optimizer as it was before its first step."""
        self._optimizer_state().clear()

    # -- whole tensors --

    def whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter whole, with its name. To be called, and gone through to the end, on every rank."""
        for name, parameter in self.parameters.items():
            yield from self._by_name(name, self._whole(parameter, self._own(parameter)))

    def whole_moments(self) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's state whole, as `exp_avg/name`, `exp_avg_sq/name` and `step/name`; as `whole_parameters`."""
        for name, parameter in self.parameters.items():
            state = self._state_of(parameter, self._moments_of(name))
            if state is not None:
                yield from ((f"{STEP}/{each}", state[STEP].clone()) for each in self.contents[name])
                for moment in self._moments_of(name):
                    pieces = self._by_name(name, self._whole(parameter, state[moment]))
                    yield from ((f"{moment}/{each}", tensor) for each, tensor in pieces)

    def load_moments(self, read: Callable[[str], Tensor | None]) -> None:
        """Take the optimizer's state from `read`: of a name as in `whole_moments` its tensor, or None."""
        for name, parameter in self.parameters.items():
            steps = [step for each in self.contents[name] if (step := read(f"{STEP}/{each}")) is not None]
            if not steps or not self._updates(parameter):
                continue
            state = {STEP: max(steps).to(self.device)}
            for moment in self._moments_of(name):
                # A parameter that never had a gradient has no moments, but may be in one with others that have.
                tensors = [(read(f"{moment}/{each}"), shape) for each, shape in self.contents[name].items()]
                flat = [
                    torch.zeros(shape.numel()) if tensor is None else tensor.flatten() for tensor, shape in tensors
                ]
                state[moment] = self._part(parameter, torch.cat(flat).to(parameter))
            self._optimizer_state()[parameter] = state

    def _by_name(self, name: str, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What a parameter of the engine holds of parameters of the model: their names and their parts of `whole`."""
        contents = self.contents[name]
        if len(contents) == 1:
            yield name, whole
            return
        pieces = whole.flatten().split([shape.numel() for shape in contents.values()])
        for (each, shape), piece in zip(contents.items(), pieces, strict=True):
            yield each, piece.view(shape).clone()  # what goes to the disk must not share memory

    def _moments_of(self, name: str) -> tuple[str, ...]:
        """The moments that the optimizer keeps of a parameter."""
        return MOMENTS[:1] if name in self.with_one_moment else MOMENTS

    def _state_of(self, parameter: nn.Parameter, moments: tuple[str, ...]) -> dict[str, Tensor] | None:
        """What this rank knows of the optimizer's state of a parameter, its step and these moments; None where no rank
        has any."""
        return self._optimizer_state().get(parameter)

    def _optimizer_state(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """The state of the parameters that this rank updates."""
        return self.optimizer.state

    def _updates(self, parameter: nn.Parameter) -> bool:
        """Whether this rank keeps moments of the parameter."""
        return True

    def _own(self, parameter: nn.Parameter) -> Tensor:
        """What this rank keeps of a parameter between two steps."""
        return parameter.detach()

    def _whole(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        """From this rank's part of something that has the parameter's shape to the whole of it."""
        return part

    def _part(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """The reverse of `_whole`, of a `whole` that is flat."""
        return whole.view(parameter.shape)
