"""How the held-out loss falls with the size of a model and the tokens that it sees, and how far that can be trusted.

A family's losses are fitted by a power law of both, L = c N^-a D^-b (Kaplan et al. 2020, arXiv:2001.08361, section
1.2, but in one product, and without a loss that neither goes below): a plane in logarithms, by least squares. It
describes what was measured. How it errs beyond that is asked of the data: the law of the shorter runs predicts
the longest.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from lines import Line, beginning_of_row, loss_of, spread

matplotlib.use("Agg")  # no screen
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

BEYOND = 4.0  # how many times the most tokens that were seen a figure goes on
PLACES = 100  # of a drawn curve
STANDARD_ERRORS = 2.0  # of a new run, on either side of a drawn line


class Point(NamedTuple):
    """What came of a run.

    Args:
        parameters: of the model, but for its embedding tables.
        tokens: that it has seen.
        loss: held out, in nats per masked token.
        steps: as its line has them.
    """

    parameters: int
    tokens: int
    loss: float
    steps: int


class PowerLaw(NamedTuple):
    """ln L = coefficients · (1, ln N, ln D).

    Args:
        coefficients: [3].
        covariance: of the coefficients, [3, 3].
        deviation: of a measured ln L from it: about the share by which a loss is off.
    """

    coefficients: np.ndarray
    covariance: np.ndarray
    deviation: float

    def predict(self, parameters: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ln L and the standard error of a new measurement of it, if the law holds; everything is [points]."""
        features = _features(parameters, tokens)
        variance = np.einsum("pi,ij,pj->p", features, self.covariance, features) + self.deviation**2
        return features @ self.coefficients, np.sqrt(variance)

    def losses(self, points: Sequence[Point]) -> np.ndarray:
        """What the law says of the losses of points, [points]."""
        return np.exp(_features_of(points) @ self.coefficients)


def _features(parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return np.stack([np.ones(len(parameters)), np.log(parameters), np.log(tokens)], axis=1)


def _features_of(points: Sequence[Point]) -> np.ndarray:
    return _features(np.array([p.parameters for p in points]), np.array([p.tokens for p in points]))


def fit(points: Sequence[Point]) -> PowerLaw | None:
    """The power law of the points; None where they are too few or of one size or budget only."""
    features = _features_of(points)
    if len(points) <= features.shape[1] or np.linalg.matrix_rank(features) < features.shape[1]:
        return None
    logarithms = np.log([point.loss for point in points])
    coefficients = np.linalg.lstsq(features, logarithms)[0]
    left_over = logarithms - features @ coefficients
    variance = left_over @ left_over / (len(points) - features.shape[1])
    return PowerLaw(coefficients, variance * np.linalg.inv(features.T @ features), float(np.sqrt(variance)))


def points_by_family(lines: Sequence[Line]) -> dict[str, list[Point]]:
    """The points of each family; what stands before the first comma of a line's name is its family."""
    families: dict[str, list[Point]] = {}
    for line in lines:
        family = families.setdefault(line.name.partition(",")[0], [])
        family.extend(map(point_of, line.results.values()))
    return {family: points for family, points in families.items() if points}


def point_of(result: dict[str, Any]) -> Point:
    """What of a result is fitted."""
    tokens = result["curve"][-1]["tokens"]
    return Point(result["non_embedding_parameters"], tokens, loss_of(result), result["steps"])


def rows_of_runs(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Cells by the title of their column: what was measured, and what the law of its family says of it."""
    laws = {family: fit(points) for family, points in points_by_family(lines).items()}
    rows = []
    for line in lines:
        points, law = [point_of(result) for result in line.results.values()], laws[line.name.partition(",")[0]]
        rows.append(
            {
                **beginning_of_row(line),
                "parameters": f"{points[0].parameters:,}",
                "tokens seen": f"{points[0].tokens / 1000:,.0f}k",
                "held-out loss (nats)": spread(point.loss for point in points),
                "the law says": f"{law.losses(points[:1])[0]:.3f}" if law else "",
            }
        )
    return rows


def rows_of_laws(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Cells by the title of their column: each family's power law, with standard errors, and how one predicts.

    The last column: by what share the losses of the most steps are above what a law of the other runs says of them,
    from the least to the greatest.
    """
    rows = []
    for family, points in points_by_family(lines).items():
        row, law, errors = {"": family, "runs": len(points)}, fit(points), errors_beyond(points)
        for number, title in ((1, "exponent of size"), (2, "exponent of tokens")):
            row[title] = (
                f"{-law.coefficients[number]:.3f} ± {law.covariance[number, number] ** 0.5:.3f}" if law else ""
            )
        row["deviation"] = f"{law.deviation:.1%}" if law else ""
        row["most steps, predicted"] = f"{min(errors):+.1%} to {max(errors):+.1%}" if errors else ""
        rows.append(row)
    return rows


def errors_beyond(points: Sequence[Point]) -> list[float]:
    """By what share the longest runs of each size lose more than the shorter ones predict.

    A size without a shorter run is left out, and where the shorter runs make no law, all are.
    """
    steps: dict[int, set[int]] = {}
    for point in points:
        steps.setdefault(point.parameters, set()).add(point.steps)
    longest = [
        point for point in points if point.steps == max(steps[point.parameters]) and len(steps[point.parameters]) > 1
    ]
    law = fit([point for point in points if point not in longest])
    if law is None or not longest:
        return []
    return list(np.array([point.loss for point in longest]) / law.losses(longest) - 1)


def draw_scaling(lines: Sequence[Line], file: Path) -> None:
    """A panel for each family: the losses by tokens, a colour for each size, and the law with its uncertainty.

    Beyond what was seen the line is dashed. The band is two standard errors of a new run, if the law goes on.
    """
    families = points_by_family(lines)
    size_of_figure = (6.5 * len(families), 5)
    figure, axes = pyplot.subplots(1, len(families), figsize=size_of_figure, sharex=True, sharey=True, squeeze=False)
    for axis, (family, points) in zip(axes[0], families.items(), strict=True):
        law = fit(points)
        least, most = min(point.tokens for point in points), max(point.tokens for point in points)
        for size in sorted({point.parameters for point in points}):
            own = [point for point in points if point.parameters == size]
            title = f"{size / 1e6:.2f} million parameters"
            dots = axis.scatter([p.tokens / 1e6 for p in own], [p.loss for p in own], label=title, zorder=3)
            if law is None:
                continue
            colour = dots.get_facecolor()[0]
            for first, last, style in ((least, most, "-"), (most, BEYOND * most, "--")):
                tokens = np.geomspace(first, last, PLACES)
                centre, error = law.predict(np.full(PLACES, size), tokens)
                axis.plot(tokens / 1e6, np.exp(centre), style, color=colour, linewidth=1.3)
                low, high = (np.exp(centre + sign * STANDARD_ERRORS * error) for sign in (-1, 1))
                axis.fill_between(tokens / 1e6, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.set(xscale="log", yscale="log", title=family, xlabel="million tokens")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    axes[0][0].set_ylabel("held-out loss (nats per masked token)")
    for axis in (axes[0][0].xaxis, axes[0][0].yaxis):  # which all panels share
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes[0][0].set_yticks([2.5, 3, 3.5, 4, 4.5, 5, 6, 7])
    save(figure, file)


def save(figure: Figure, file: Path) -> None:
    """Write a figure to a file, and forget it."""
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
