"""Pictures of a run: its curves, and where a reader loses EM and F1."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ..errors import UserError
from ..evaluation.reading_report import ERRORS, JudgedQuestion, scores_by_part, scores_of, telling_aspects

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Panels of the picture: title, and the tags that are drawn in it where the run has them.
PANELS = (
    ("masked tokens: loss (nats)", ("train/mlm_loss", "eval/mlm_loss", "eval/unigram_loss")),
    ("total loss (nats)", ("train/loss",)),
    ("second objective: loss (nats)", ("train/sop_loss", "train/ict_loss")),
    ("reading: loss (nats)", ("train/reading_loss",)),
    ("reading: held-out EM and F1 (%)", ("eval/exact_match", "eval/f1")),
    ("retrieval: held-out MRR@10 and accuracy (%)", ("eval/mrr@10", "eval/accuracy@1", "eval/accuracy@10")),
    ("in-batch retrieval accuracy", ("train/ict_accuracy",)),
    ("held-out accuracy", ("eval/mlm_accuracy", "eval/sop_accuracy", "eval/ict_recall@1")),
    ("learning rate", ("train/lr",)),
    ("gradient norm", ("train/grad_norm",)),
    ("tokens per second", ("train/tokens_per_second",)),
    ("router losses", ("train/aux_loss",)),
)


KOREAN_FONTS = (
    "Noto Sans CJK KR",
    "Noto Sans KR",
    "NanumGothic",
    "Malgun Gothic",
    "Apple SD Gothic Neo",
    "AppleGothic",
)

FEWEST_BARS = 6  # of a panel: where there are fewer, they leave room

Curves = dict[str, list[tuple[int, float]]]  # tag -> (step, value), ascending


def read_curves(run_folder: Path) -> Curves:
    """The scalars of a run by tag: (step, value), ascending. A step written again after a resume counts once."""
    curves: Curves = {}
    # Read as folders: a resumed run writes where its curves go on, and what lies behind that is left out.
    for folder in sorted({path.parent for path in run_folder.rglob("events.out.tfevents.*")}):
        accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        accumulator.Reload()
        for tag in accumulator.Tags()["scalars"]:
            points = {event.step: event.value for event in accumulator.Scalars(tag)}
            curves[tag] = sorted(points.items())
    return curves


def last_values(curves: Curves) -> list[tuple[str, int, float]]:
    """The newest point of each curve: (tag, step, value)."""
    return [(tag, *curves[tag][-1]) for tag in sorted(curves)]


def plot_curves(runs: dict[str, Curves], out: Path) -> None:
    """Draw the curves of one or several runs into one PNG; of several, each has its colour.

    Args:
        runs: name -> curves.
        out: the picture to write.

    Raises:
        UserError: matplotlib is not installed, or the picture cannot be written.
    """
    pyplot = _pyplot()
    expert_tags = sorted({tag for run in runs.values() for tag in run if tag.startswith("train/expert_")})
    panels = [*PANELS, ("share of tokens per expert, and dropped", (*expert_tags, "train/dropped_share"))]
    telling = {tag for run in runs.values() for tag in _telling(run)}
    panels = [(title, tags) for title, tags in panels if telling.intersection(tags)]
    if not panels:
        raise UserError(
            f"{', '.join(runs)}: no curve of a training there, only {', '.join(next(iter(runs.values())))}"
        )
    figure, axes = _grid(pyplot, len(panels))
    colours = pyplot.rcParams["axes.prop_cycle"].by_key()["color"]
    for axis, (title, tags) in zip(axes, panels, strict=True):
        for run_number, (label, run) in enumerate(runs.items()):
            for tag_number, tag in enumerate(tag for tag in tags if tag in run):
                steps, values = zip(*run[tag], strict=True)
                one_run = len(runs) == 1
                axis.plot(
                    steps,
                    values,
                    label=tag if one_run else f"{label} {tag}",
                    color=colours[(tag_number if one_run else run_number) % len(colours)],
                    linestyle=("-", "--", ":", "-.")[0 if one_run else tag_number % 4],
                    linewidth=1.2,
                    marker="o" if len(steps) == 1 else None,
                )
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7)
    _save(figure, ", ".join(runs), out)


def _telling(run: Curves) -> set[str]:
    """Tags worth a panel: what is not 0 throughout, and the total only where it is the sum of several losses."""
    tags = {tag for tag, points in run.items() if any(value for _, value in points)}
    losses = [tag for tag in tags if tag.startswith("train/") and tag.endswith("_loss")]
    return tags - {"train/loss"} if len(losses) == 1 else tags


def plot_reading(name: str, questions: Sequence[JudgedQuestion], out: Path) -> None:
    """Draw EM and F1 of each part of the questions, and the kinds of errors, as bars into a PNG.

    Args:
        name: of the run.
        questions: of its evaluation.
        out: the picture to write.

    Raises:
        UserError: matplotlib is not installed, or the picture cannot be written.
    """
    pyplot = _pyplot()
    whole, aspects = scores_of(questions), telling_aspects(questions)
    figure, axes = _grid(pyplot, len(aspects) + 1)
    for axis, (aspect, parts) in zip(axes, aspects, strict=False):
        places = range(len(parts))
        for shift, measure, scores in (
            (-0.2, "EM", [part.exact_match for part in parts.values()]),
            (0.2, "F1", [part.f1 for part in parts.values()]),
        ):
            axis.barh([place + shift for place in places], scores, height=0.4, label=measure)
        axis.axvline(whole.exact_match, color="C0", linestyle=":", linewidth=1.2)
        axis.axvline(whole.f1, color="C1", linestyle=":", linewidth=1.2)
        axis.set_xlabel("% (dotted: all questions)", fontsize=8)
        _name_bars(axis, f"by {aspect.title}", {part: scores.questions for part, scores in parts.items()})
        axis.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)  # beside the title
    kinds = {kind: scores.questions for kind, scores in scores_by_part(questions, ERRORS).items() if kind != "correct"}
    axes[-1].barh(range(len(kinds)), [100 * count / sum(kinds.values()) for count in kinds.values()], color="C2")
    axes[-1].set_xlabel("% of the errors", fontsize=8)
    _name_bars(axes[-1], "errors", kinds)
    title = f"{name}: {whole.questions:,} questions, EM {whole.exact_match:.1f}, F1 {whole.f1:.1f}"
    _save(figure, f"{title}, EM ceiling {whole.expressible:.1f}", out)


def _pyplot() -> ModuleType:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("drawing needs matplotlib; install it with: pip install 'mixlm[plot]'") from error

    matplotlib.use("Agg")  # no screen
    from matplotlib import font_manager, pyplot

    installed = set(font_manager.get_font_names())
    # A run may have a Korean name; what none of these has is drawn by the default font.
    pyplot.rcParams["font.family"] = [*(font for font in KOREAN_FONTS if font in installed), "DejaVu Sans"]
    return pyplot


def _grid(pyplot: ModuleType, panels: int) -> tuple["Figure", list["Axes"]]:
    """A figure with this many panels, three in a row."""
    columns = 3
    rows = -(-panels // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5 * columns, 3.4 * rows), squeeze=False)
    for axis in axes.flat[panels:]:
        axis.axis("off")
    return figure, list(axes.flat[:panels])


def _name_bars(axis: "Axes", title: str, counts: dict[str, int]) -> None:
    """Give horizontal bars, the first on top, their names and numbers of questions."""
    axis.set_title(title, fontsize=10, loc="left")
    axis.tick_params(labelsize=8)
    axis.set_yticks(range(len(counts)), [f"{name} ({count:,})" for name, count in counts.items()])
    axis.set_ylim(max(len(counts), FEWEST_BARS) - 0.5, -0.5)
    axis.set_xlim(0, 100)
    axis.grid(axis="x", alpha=0.3)


def _save(figure: "Figure", title: str, out: Path) -> None:
    from matplotlib import pyplot

    figure.suptitle(title, fontsize=12)
    figure.tight_layout()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: cannot be written: {error}") from error
    finally:
        pyplot.close(figure)
