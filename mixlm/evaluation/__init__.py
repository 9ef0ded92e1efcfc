"""How good answers are: EM and F1 of reading, and what kind of errors are made; and how good rankings are."""

from pathlib import Path

from ..errors import UserError

METRICS = ("squad_v1", "squad_v2", "korquad_v1")


def metric_path(name: str) -> str:
    """The folder of a metric, for `evaluate.load(metric_path("korquad_v1"))`; nothing is downloaded for it.

    Args:
        name: one of `METRICS`.

    Raises:
        UserError: there is no such metric.
    """
    if name not in METRICS:
        raise UserError(f"no metric '{name}'; there are {', '.join(METRICS)}")
    return str(Path(__file__).parent / name)
