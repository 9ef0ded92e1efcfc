"""Curves of a run as a picture."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ..errors import UserError

# Panels of the picture: title, and the tags that are drawn in it where the run has them.
PANELS = (
    ("masked tokens: loss (nats)", ("train/mlm_loss", "eval/mlm_loss", "eval/unigram_loss")),
    ("total loss (nats)", ("train/loss",)),
    ("second objective: loss (nats)", ("train/sop_loss", "train/ict_loss")),
    ("reading: loss (nats)", ("train/reading_loss",)),
    ("reading: held-out EM and F1 (%)", ("eval/exact_match", "eval/f1")),
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

Curves = dict[str, list[tuple[int, float]]]  # tag -> (step, value), ascending


def read_curves(run_folder: Path) -> Curves:
    """The scalars of a run by tag: (step, value), ascending. A step written again after a resume counts once.

    Raises:
        UserError: the folder holds no curves.
    """
    curves: Curves = {}
    # Read as folders: a resumed run writes where its curves go on, and what lies behind that is left out.
    for folder in sorted({path.parent for path in run_folder.rglob("events.out.tfevents.*")}):
        accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        accumulator.Reload()
        for tag in accumulator.Tags()["scalars"]:
            points = {event.step: event.value for event in accumulator.Scalars(tag)}
            curves[tag] = sorted(points.items())
    if not curves:
        raise UserError(f"{run_folder}: no curves there; give a run's folder (output_dir/model_name)")
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
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("drawing needs matplotlib; install it with: pip install 'mixlm[plot]'") from error

    matplotlib.use("Agg")  # no screen
    from matplotlib import font_manager, pyplot

    installed = set(font_manager.get_font_names())
    # A run may have a Korean name; what none of these has is drawn by the default font.
    pyplot.rcParams["font.family"] = [*(font for font in KOREAN_FONTS if font in installed), "DejaVu Sans"]

    expert_tags = sorted({tag for run in runs.values() for tag in run if tag.startswith("train/expert_")})
    panels = [*PANELS, ("share of tokens per expert, and dropped", (*expert_tags, "train/dropped_share"))]
    panels = [
        (title, tags)
        for title, tags in panels
        if any(value for run in runs.values() for tag in tags for _, value in run.get(tag, []))
    ]
    if not panels:
        raise UserError(
            f"{', '.join(runs)}: no curve of a training there, only {', '.join(next(iter(runs.values())))}"
        )
    columns = 3
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5 * columns, 3.4 * rows), squeeze=False)
    colours = pyplot.rcParams["axes.prop_cycle"].by_key()["color"]
    for axis, (title, tags) in zip(axes.flat, panels, strict=False):
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
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    figure.suptitle(", ".join(runs), fontsize=12)
    figure.tight_layout()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {out}: cannot be written: {error}") from error
    finally:
        pyplot.close(figure)
