#!/usr/bin/env python
"""Measure how the cost of a training step grows with the length, the layers, the experts and the vocabulary.

    python benchmarks/growth.py                              the series that growth.json lacks
    python benchmarks/growth.py --series length [NAME ...]   these alone
    python benchmarks/growth.py --again                      also those that are there
    python benchmarks/growth.py --steps 5                    more timed steps a point

growth.json, growth.png and the table in README.md are kept up after every series, so a run may be stopped at any time.
All series take about {minutes} minutes of one core, and 12 GiB at the most. Close other programs first.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; the processes of the memory inherit it
os.environ.setdefault("HF_HUB_OFFLINE", "1")

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import numpy as np
import pages
import torch
from measure import interleaved, medians, peak_memory
from transformers import AutoModelForPreTraining, PreTrainedModel

from mixlm import MixLMConfig, MixLMSwitchConfig
from mixlm.errors import UserError, exits_on_user_error, one_line
from mixlm.files import json_text, partial_name, write_whole
from mixlm.profiling import TrainingStep, random_batch, run

DATA, PICTURE, README = "growth.json", "growth.png", "README.md"
PLACE = "growth"  # of the table in README.md
MINUTES = 8  # of one core, for all series

FEWEST_STEPS = 3
TOKENS_OF_LENGTHS = 4096  # of every step of the series of lengths
LONGEST = 4096
LAYERS = 3  # of every model, but in the series of layers
QUANTITIES = ("seconds", "memory", "parameters")  # of a point, whose growth is told


@dataclass(frozen=True)
class Plan:
    """What one point trains: the model and the batch, `rows` texts of `length` tokens."""

    config: MixLMConfig | MixLMSwitchConfig
    rows: int
    length: int


@dataclass(frozen=True)
class Series:
    """Points that differ in one number.

    Args:
        values: of this number, each twice the one before.
        axis: what the number is.
        shape: what all points have in common, for a reader.
        plan: the point of a value.
        explanation: one line: why the cost grows as it does.
    """

    values: tuple[int, ...]
    axis: str
    shape: str
    plan: Callable[[int], Plan]
    explanation: str


@dataclass(frozen=True)
class Point:
    """The cost of one training step.

    Args:
        value: of the number that the series varies.
        seconds: CPU time, the median of the timed steps.
        memory: peak above the level just before the step, in bytes: activations and gradients.
        parameters: of the model, each shared one counted once.
    """

    value: int
    seconds: float
    memory: int
    parameters: int


# -- the series ------------------------------------------------------------------------------------------------------


def doublings(first: int, last: int) -> tuple[int, ...]:
    """first, 2 first, 4 first, ... last."""
    values = [first]
    while values[-1] < last:
        values.append(2 * values[-1])
    return tuple(values)


def plan_length(length: int) -> Plan:
    """The same number of tokens at every length, and the same table of positions."""
    config = MixLMConfig.from_preset("mixlm-base", num_hidden_layers=LAYERS, max_position_embeddings=LONGEST)
    return Plan(config, TOKENS_OF_LENGTHS // length, length)


def plan_layers(layers: int) -> Plan:
    return Plan(MixLMConfig.from_preset("mixlm-base", num_hidden_layers=layers), 4, 128)


def plan_experts(experts: int) -> Plan:
    config = MixLMSwitchConfig.from_preset("mixlm-switch-base", num_hidden_layers=LAYERS, n_experts=experts)
    return Plan(config, 8, 128)


def plan_vocabulary(words: int) -> Plan:
    return Plan(MixLMConfig.from_preset("mixlm-base", num_hidden_layers=LAYERS, vocab_size=words), 8, 128)


SERIES = {
    "length": Series(
        doublings(128, LONGEST),
        "length of a text, tokens",
        "mixlm-base with 3 layers, 4,096 tokens a step",
        plan_length,
        "B texts of L tokens with B x L fixed: convolutions, dense layers and heads cost the same at every length, "
        "and attention scores (B x L² a map) grow as L, so time goes from L^0 towards L^1; in memory one buffer of "
        "scores and one of their gradient serve all layers and also grow as L, while from 1,024 tokens on the "
        "activations of the feed-forward are computed twice instead of kept, which is a step down there.",
    ),
    "layers": Series(
        doublings(3, 24),
        "layers",
        "mixlm-base, layer_group 3, 4 x 128 tokens",
        plan_layers,
        "every layer computes, and keeps its activations, whether or not it shares parameters, so both go towards "
        "the first power from below: embeddings, MLM head and their AdamW (16 million parameters) do not grow, nor "
        "does the one buffer of scores, and with few layers the peak of memory is at the end of the backward pass "
        "(all gradients, the embedding's twice) and not at its beginning (all activations); of the parameters "
        "attention grows by layers and the feed-forward, 8 times as large, by groups of 3 layers.",
    ),
    "experts": Series(
        doublings(4, 128),
        "experts",
        "mixlm-switch-base with 3 layers in one group, 8 x 128 tokens",
        plan_experts,
        "a token meets 1 expert however many there are, so the products of a step stay the same (a router's C x E "
        "are few); gradients and AdamW are of all parameters, E x 2CF, and every expert's weights are read for ever"
        " fewer tokens, so time goes from E^0 towards E^1, and memory, which is mostly gradients, gets there sooner.",
    ),
    "vocabulary": Series(
        doublings(8000, 128000),
        "vocabulary, tokens",
        "mixlm-base with 3 layers, 8 x 128 tokens",
        plan_vocabulary,
        "the decoder meets only the labelled 15 % of the tokens, which makes its products and logits 7 times fewer,"
        " but they are linear in V (at 128,000 they are as many as the encoder's, which do not know V); the "
        "gradient of the tied embedding (V x C, once from each of its two uses) and AdamW are linear in V whatever "
        "is labelled, so both go from V^0 towards V^1.",
    ),
}


# -- one training step -----------------------------------------------------------------------------------------------


def build_model(plan: Plan) -> PreTrainedModel:
    """The same new model each time."""
    torch.manual_seed(0)
    return AutoModelForPreTraining.from_config(plan.config)


def build_step(plan: Plan) -> tuple[Callable[[], None], int]:
    """A training step (forward, backward, AdamW) and the parameters of its model.

    A step on a tiny batch is made here: AdamW's moments are there before, as in every step of a run but the first.
    """
    model = build_model(plan)
    step = TrainingStep(model, random_batch(plan.config, 1, 16))
    run(step)
    step.batch = random_batch(plan.config, plan.rows, plan.length)
    return partial(run, step), sum(parameter.numel() for parameter in model.parameters())


def prepare_step(name: str, value: int) -> Callable[[], None]:
    """The work whose memory is measured: the step of one point of the series `name`."""
    return build_step(SERIES[name].plan(value))[0]


def measure_series(name: str, steps: int) -> list[Point]:
    """The points of a series: time while they take turns, memory each in a process of its own."""
    series = SERIES[name]
    print(f"{name}: {series.shape}; memory ...", flush=True)
    memory = {value: peak_memory("growth:prepare_step", name=name, value=value) for value in series.values}
    print(f"  time, {steps} steps in turns ...", flush=True)
    built = {value: build_step(series.plan(value)) for value in series.values}
    # No round warms up: a tiny step did already (`build_step`), and the median leaves a slow first one out.
    competitors = {str(value): step for value, (step, _) in built.items()}
    seconds = medians(interleaved(competitors, pairs=steps, warm_up=0))
    points = [Point(value, seconds[str(value)], memory[value], built[value][1]) for value in series.values]
    for point in points:
        print(f"  {point.value:>7,}: {point.seconds:7.2f} s {point.memory / 2**20:9,.0f} MiB", flush=True)
    return points


# -- exponents -------------------------------------------------------------------------------------------------------


def power_law(values: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """The exponent p and factor a of the power law a x value^p nearest to the costs (least squares of logarithms)."""
    exponent, logarithm = np.polyfit(np.log(values), np.log(costs), 1)
    return float(exponent), float(np.exp(logarithm))


def exponents(points: Sequence[Point]) -> dict[str, dict[str, float]]:
    """Of seconds, memory and parameters: the exponent of all points and that of the last doubling.

    What does not grow hides what does at the small end; the last doubling shows more of where it goes.
    """
    values = [point.value for point in points]
    found = {}
    for quantity in QUANTITIES:
        costs = [getattr(point, quantity) for point in points]
        found[quantity] = {
            "all": power_law(values, costs)[0],
            "last_doubling": power_law(values[-2:], costs[-2:])[0],
        }
    return found


# -- what is kept ----------------------------------------------------------------------------------------------------


def read_points(path: Path) -> dict[str, list[Point]]:
    """The kept points by series, in the order of SERIES; none where there is no file yet.

    Raises:
        UserError: the file holds something else.
    """
    if not path.exists():
        return {}
    try:
        kept = json.loads(path.read_text("utf-8"))
        return {name: [Point(**point) for point in kept[name]["points"]] for name in SERIES if name in kept}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: not the points of series ({one_line(error)}); delete it and measure again"
        ) from error


def keep(kept: dict[str, list[Point]], folder: Path) -> None:
    """Write growth.json, the table in README.md and growth.png, each whole at every moment."""
    entries = {
        name: {
            "shape": SERIES[name].shape,
            "axis": SERIES[name].axis,
            "units": {"seconds": "s", "memory": "bytes"},
            "points": [asdict(point) for point in kept[name]],
            "exponents": exponents(kept[name]),
        }
        for name in SERIES
        if name in kept
    }
    write_whole(folder / DATA, json_text(entries))
    pages.replace(folder / README, PLACE, f"{table(kept)}\n\n![How cost grows]({PICTURE})")
    picture = partial_name(folder / PICTURE)
    draw(kept, picture)
    picture.replace(folder / PICTURE)


def table(kept: dict[str, list[Point]]) -> str:
    """The series as a Markdown table, smallest to largest point, and a line a series that says why."""
    titles = ["series", "values"]
    for quantity in ("CPU time of a step, s", "peak memory of a step, MiB", "parameters, millions"):
        titles += [quantity, "exponent (last doubling)"]
    lines = [f"| {' | '.join(titles)} |", "|---|---|--:|--:|--:|--:|--:|--:|"]
    reasons = []
    for name in (name for name in SERIES if name in kept):
        first, last = kept[name][0], kept[name][-1]
        found = exponents(kept[name])
        grown = {
            "seconds": f"{first.seconds:.2f} to {last.seconds:.2f}",
            "memory": f"{first.memory / 2**20:,.0f} to {last.memory / 2**20:,.0f}",
            "parameters": f"{first.parameters / 1e6:.1f} to {last.parameters / 1e6:.1f}",
        }
        cells = [f"**{name}**", f"{first.value:,} to {last.value:,}"]
        for quantity in QUANTITIES:
            power = found[quantity]
            # Rounded first, and 0.0 added: a quantity that does not grow has exponent 0, not -0.
            rounded = {end: round(power[end], 2) + 0.0 for end in ("all", "last_doubling")}
            cells += [grown[quantity], f"**{rounded['all']:.2f}** ({rounded['last_doubling']:.2f})"]
        lines.append(f"| {' | '.join(cells)} |")
        reasons.append(f"* **{name}** ({SERIES[name].shape}): {SERIES[name].explanation}")
    return "\n".join([*lines, "", *reasons])


def draw(kept: dict[str, list[Point]], out: Path) -> None:
    """A panel a series, 1,200 pixels wide: time on the left axis, memory on the right, both axes over the same span,
    so that equal slopes are equal exponents."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("drawing needs matplotlib; install it with: pip install 'mixlm[plot]'") from error

    matplotlib.use("Agg")  # no screen
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 9.5))
    for axis, name in zip(axes.flat, SERIES, strict=True):
        axis.set_title(f"{name}\n{SERIES[name].shape}", fontsize=11)
        if name not in kept:
            axis.text(0.5, 0.5, "not measured yet", ha="center", va="center", transform=axis.transAxes)
            axis.set(xticks=[], yticks=[])
            continue
        values = [point.value for point in kept[name]]
        seconds = [point.seconds for point in kept[name]]
        mebibytes = [point.memory / 2**20 for point in kept[name]]
        found = exponents(kept[name])
        span = 1.8 * max(max(costs) / min(costs) for costs in (seconds, mebibytes))
        handles = []
        for side, quantity, costs, label, unit, colour, marker in (
            (axis, "seconds", seconds, "CPU time", "s", "tab:blue", "o"),
            (axis.twinx(), "memory", mebibytes, "peak memory", "MiB", "tab:red", "s"),
        ):
            power, factor = power_law(values, costs)
            last = found[quantity]["last_doubling"]
            side.plot(values, costs, linestyle="", marker=marker, color=colour)
            handles += side.plot(
                values,
                [factor * value**power for value in values],
                linestyle="-" if marker == "o" else "--",
                marker=marker,
                markevery=[],
                color=colour,
                label=f"{label}: exponent {power:.2f}, last doubling {last:.2f}",
            )
            middle = (min(costs) * max(costs)) ** 0.5
            side.set(xscale="log", yscale="log", ylim=(middle / span**0.5, middle * span**0.5))
            side.set_ylabel(f"{label} of a step, {unit}", color=colour)
            side.tick_params(axis="y", which="both", labelcolor=colour)
            side.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            side.yaxis.set_major_formatter(
                ticker.FuncFormatter(lambda cost, _: f"{cost:,.0f}" if cost >= 100 else f"{cost:.3g}")
            )
            side.yaxis.set_minor_formatter(ticker.NullFormatter())
        axis.set_xticks(values, [f"{value:,}" for value in values])
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.set_xlabel(SERIES[name].axis)
        axis.grid(alpha=0.3)
        axis.legend(handles=handles, fontsize=10, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    figure.suptitle("How the cost of a training step grows (one thread; points and fitted power laws)", fontsize=14)
    figure.tight_layout()
    figure.savefig(out, dpi=100, format="png")
    pyplot.close(figure)


# -- the program -----------------------------------------------------------------------------------------------------


def run_series(
    names: Sequence[str],
    steps: int,
    again: bool,
    folder: Path = FOLDER,
    measure: Callable[[str, int], list[Point]] = measure_series,
) -> None:
    """Measure series one after the other and keep each as soon as it is there.

    Args:
        names: of the series.
        steps: timed, a point.
        again: measure those too that are kept already.
        folder: of growth.json, growth.png and README.md.
        measure: gives the points of a series from its name and the steps.
    """
    kept = read_points(folder / DATA)
    for name in names:
        if name in kept and not again:
            print(f"{name}: there already (--again measures it again)", flush=True)
            continue
        kept[name] = measure(name, steps)
        keep(kept, folder)
    keep(kept, folder)  # also where nothing was measured: the explanations or the drawing may be newer


@exits_on_user_error
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.format(minutes=MINUTES), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--series", nargs="+", choices=list(SERIES), default=list(SERIES), help="default: all")
    parser.add_argument("--again", action="store_true", help="measure also what growth.json has")
    parser.add_argument(
        "--steps", type=int, default=FEWEST_STEPS, help=f"timed steps a point, at least {FEWEST_STEPS} (the default)"
    )
    arguments = parser.parse_args(argv)
    if arguments.steps < FEWEST_STEPS:
        raise UserError(f"--steps {arguments.steps}: a median needs at least {FEWEST_STEPS}")
    torch.set_num_threads(1)
    print(f"all series take about {MINUTES} minutes", flush=True)
    run_series(arguments.series, arguments.steps, arguments.again)
    return 0


if __name__ == "__main__":
    sys.exit(main())
