"""Which modules are gathered and freed as one under full sharding (`--auto_wrap`)."""

from collections.abc import Collection
from typing import NamedTuple

from torch import nn

ROOT = "(everything else)"


class Unit(NamedTuple):
    """Parameters that are gathered, used and freed together.

    Args:
        name: of the module in the model, or `ROOT`.
        module: the module, or for the root the model.
        parameters: those that no other unit has.
    """

    name: str
    module: nn.Module
    parameters: list[nn.Parameter]

    @property
    def numel(self) -> int:
        """How many numbers its parameters hold."""
        return sum(parameter.numel() for parameter in self.parameters)


def sharding_units(model: nn.Module) -> list[Unit]:
    """The units of a model; the last is the root, which has what no other has.

    A unit is an element of an outermost ModuleList: a block of the stack, as long as its parameters are its own. A
    block that is called for several layers is one unit, because it is one module. One that shares a parameter with
    something outside of it (tied embeddings) stays in the root: a parameter cannot be in two units. Nor is a block of
    nothing but vectors (LayerNorms) worth the trouble of gathering it.
    """
    modules_of: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            modules_of.setdefault(parameter, set()).add(module)

    units: list[Unit] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{unit.name}.") for unit in units):
            continue
        for number, block in module.named_children():
            parameters = list(block.parameters())
            inside = set(block.modules())
            is_closed = all(modules_of[parameter] <= inside for parameter in parameters)
            has_matrix = any(parameter.dim() > 1 for parameter in parameters)
            # The same block in two lists is one unit.
            if is_closed and has_matrix and all(block is not unit.module for unit in units):
                units.append(Unit(f"{name}.{number}", block, parameters))
    taken = {parameter for unit in units for parameter in unit.parameters}
    root = Unit(ROOT, model, [parameter for parameter in model.parameters() if parameter not in taken])
    return [*units, root]


def describe(units: list[Unit], ranks: int, with_one_moment: Collection[nn.Parameter] = ()) -> str:
    """A table of the units: parameters, and the bytes of weight, gradient and moments that one rank keeps of them.

    Args:
        units: of the model, whole.
        ranks: among which they are shared out.
        with_one_moment: parameters of which the optimizer keeps one moment and not two.
    """
    width = max(len(unit.name) for unit in units)
    lines = [f"{'unit':{width}}  {'parameters':>14}  {'MiB a rank':>10}"]
    for unit in units:
        kept = 0
        for parameter in unit.parameters:
            moments = 1 if parameter in with_one_moment else 2
            kept += (2 + moments) * parameter.numel() * parameter.element_size()
        lines.append(f"{unit.name:{width}}  {unit.numel:>14,}  {kept / ranks / 2**20:>10,.1f}")
    return "\n".join(lines)
