"""`mixlm profile` and `plan`: what a step takes, and what a training will need."""

import argparse
import re
from typing import TYPE_CHECKING

from ..errors import UserError, is_out_of_memory
from .options import require_positive
from .tables import did_you_mean, table

if TYPE_CHECKING:
    from tqdm import tqdm
    from transformers import PretrainedConfig, PreTrainedModel

    from ..planning import Plan
    from ..profiling import MemoryUse, OperatorTime, Profile

DEFAULT_MLM_PROBABILITY = 0.4  # run_pretraining.py's default, which a parser of this program need not load torch for


def add_profile_parser(subparsers) -> None:
    """Add `mixlm profile`."""
    parser = subparsers.add_parser(
        "profile",
        help="show where a training step spends time, arithmetic and memory",
        description=(
            "Measure a training step on random ids: forward with MLM and the second objective, backward, AdamW. "
            "Prints time by phase, arithmetic against what the machine can do, the slowest operators, memory by kind."
        ),
        epilog="example:\n  mixlm profile --preset mixlm-base --shape 8x128",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--preset", metavar="NAME", help="a preset, with random weights")
    source.add_argument("--model", metavar="DIR", help="a model's folder, or its name on the Hub")
    parser.add_argument(
        "--shape", default="8x128", metavar="ROWSxTOKENS", help="the batch, all real tokens (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of torch (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="measured steps (default: %(default)s)")
    parser.add_argument("--top", type=int, default=12, metavar="N", help="operators to show (default: %(default)s)")
    _add_masked_share(parser)
    parser.add_argument("--inference", action="store_true", help="the encoder's forward alone, without gradients")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to run (default: cuda where there is one)")
    parser.set_defaults(run=profile_verb)


def add_plan_parser(subparsers) -> None:
    """Add `mixlm plan`."""
    parser = subparsers.add_parser(
        "plan",
        help="show what a training will need: memory by --zero, rows that fit, hours",
        description=(
            "Show, before a training is started, what a process will need of memory with each --zero, how many rows "
            "fit and, after a short training where this machine has as many GPUs or cores, tokens/s and hours. No "
            "memory is taken but by that training, so that a plan may be for a larger machine. The exit code is 2 if "
            "nothing fits."
        ),
        epilog=(
            "examples:\n  mixlm plan --preset mixlm-base\n"
            "  mixlm plan --config_file large.json --device cuda --world_size 8 --device_memory 80GB --bf16"
        ),
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--preset", metavar="NAME", help="a preset of either family")
    source.add_argument("--config_file", metavar="JSON", help="a configuration of either family")
    parser.add_argument("--task", choices=("SOP", "ICT"), default="SOP", help="default: %(default)s")
    parser.add_argument(
        "--zero", type=int, nargs="+", choices=range(4), metavar="0..3", help="default: all, with one process 0"
    )
    parser.add_argument("--sharding_backend", choices=("torch", "fairscale"), default="torch", help="default: torch")
    parser.add_argument("--auto_wrap", action="store_true", help="full sharding by blocks, as in training")
    parser.add_argument(
        "--world_size", type=int, metavar="N", help="processes (default: the GPUs that are here, or 1)"
    )
    parser.add_argument(
        "--device_memory", metavar="SIZE", help="of a process, such as 80GB (default: its share of what is free here)"
    )
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--fp16", action="store_true", help="matrix products in fp16")
    precision.add_argument("--bf16", action="store_true", help="matrix products in bf16")
    parser.add_argument("--muon", action="store_true", help="Muon for the matrices of the layers, as in training")
    for option, default, what in (
        ("train_batch_size", 0, "rows of a forward pass of a process; 0 = as many as fit"),
        ("gradient_accumulation_steps", 1, "forward passes of a step"),
        ("max_seq_length", 128, "tokens of a row"),
        ("num_steps", 10_000, "optimizer steps"),
        ("probe_steps", 20, "steps of the short training; 0 = none"),
    ):
        parser.add_argument(
            f"--{option}", type=int, default=default, metavar="N", help=f"{what} (default: {default:,})"
        )
    _add_masked_share(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.set_defaults(run=plan_verb)


def _add_masked_share(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mlm_probability",
        type=float,
        default=DEFAULT_MLM_PROBABILITY,
        metavar="P",
        help="share of the tokens that are to be predicted (default: %(default)s)",
    )


def profile_verb(arguments: argparse.Namespace) -> None:
    """`mixlm profile`."""
    require_positive(arguments, "threads", "steps", "top")
    shape = re.fullmatch("([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", arguments.shape)
    if shape is None:
        raise UserError(f"--shape {arguments.shape}: give rows x tokens, both from 1 to 999,999, such as 8x128")
    rows, length = map(int, shape.groups())
    _require_masked_share(arguments)
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu")
    from ..profiling import EncoderForward, TrainingStep, profile_step, random_batch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    try:
        model = _model_to_profile(arguments, length).to(device)
        on_cpu = random_batch(model.config, rows, length, arguments.mlm_probability)
        batch = {name: inputs.to(device) for name, inputs in on_cpu.items()}
        step = EncoderForward(model, batch) if arguments.inference else TrainingStep(model, batch)
        profile = profile_step(step, arguments.steps)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"--shape {arguments.shape}: too large for the memory of {device}; give fewer rows or tokens"
        ) from error

    kind = f"{model.config.pretraining_objective.upper()} training step"
    print(f"{arguments.preset or arguments.model}: {'encoder forward' if arguments.inference else kind}")
    predicted = None if arguments.inference else arguments.mlm_probability
    print(table(_setting_rows(model, rows, length, predicted, arguments.threads)))
    print("\ntime")
    print(table(_time_rows(profile, arguments.steps)))
    print("\narithmetic")
    print(table(_arithmetic_rows(profile)))
    print(f"\noperators{', time of their kernels' if device == 'cuda' else ''}")
    print(table(_operator_rows(profile.operators, arguments.top)))
    print("\nmemory")
    print(table(_memory_rows(profile.memory, arguments.inference)))


def plan_verb(arguments: argparse.Namespace) -> None:
    """`mixlm plan`."""
    for option, least in (
        *(("world_size", 1), ("train_batch_size", 0), ("gradient_accumulation_steps", 1)),
        *(("max_seq_length", 8), ("num_steps", 1), ("probe_steps", 0)),
    ):
        value, most = getattr(arguments, option), 10_000 if option == "world_size" else 10**9
        if value is not None and not least <= value <= most:
            raise UserError(f"--{option} {value}: must be from {least} to {most:,}")
    _require_masked_share(arguments)
    import torch

    from ..planning import Setting, make_plans
    from ..progress import progress_bar
    from ..training.batch_size import MARGIN

    config = _config_to_plan(arguments)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    ranks = arguments.world_size or (torch.cuda.device_count() if device == "cuda" else 1) or 1
    memory = _memory_of_a_process(arguments.device_memory, device, ranks)
    budget = int((1 - MARGIN) * memory)

    precision = "fp16" if arguments.fp16 else "bf16" if arguments.bf16 else "fp32"
    accumulates = arguments.gradient_accumulation_steps > 1
    how = (arguments.sharding_backend, arguments.auto_wrap, ranks)
    settings = [
        Setting(zero, *how, precision, accumulates, device, arguments.mlm_probability, arguments.muon)
        for zero in sorted(set(arguments.zero or (range(4) if ranks > 1 else [0])))
    ]
    for setting in settings:
        setting.training_arguments(model_name="planned")  # refuses what a training would
    name, length = arguments.preset or arguments.config_file, arguments.max_seq_length
    with progress_bar(desc="planning", total=2 * len(settings), leave=False) as progress:
        plans = []
        for plan in make_plans(config, length, settings, arguments.train_batch_size, budget):
            plans.append(plan)
            progress.update()
        speeds, reasons = _speeds(config, plans, length, arguments.probe_steps, progress)

    print(
        f"{name}: {plans[0].numbers:,} parameters, {arguments.task}, {precision}, "
        f"{'Muon, ' if arguments.muon else ''}{length:,} tokens a row, "
        f"{arguments.mlm_probability:.0%} to predict, {ranks:,} {'process' if ranks == 1 else 'processes'} on {device}"
    )
    print(
        f"A process may use {budget / 1e6:,.0f} of {memory / 1e6:,.0f} MB. In MB, of the process that needs most, "
        "when it needs most:"
    )
    print(table(_plan_rows(plans, speeds, arguments, length)))
    for reason in dict.fromkeys(reasons):
        print(f"no tokens/s: {reason}")
    if ranks == 1 and settings[-1].zero:
        print("One process has nothing to share out: every --zero is as 0.")
    fitting = [plan for plan in plans if plan.rows <= plan.most_rows]
    if not fitting:
        least = min(plans, key=lambda plan: plan.use.total)
        raise UserError(
            f"nothing fits: with --zero {least.setting.zero} a process needs {least.use.total / 1e6:,.0f} MB at the "
            f"{least.use.moment}, and may use {budget / 1e6:,.0f}; use a smaller --train_batch_size or "
            "--max_seq_length, --auto_wrap, more --world_size, or a smaller model"
        )
    print(f"--zero {fitting[0].setting.zero} is enough. Give run_pretraining.py, with corpus and tokenizer:")
    print(f"  {_plan_flags(fitting[0], config.model_type, arguments)}")


def _config_to_plan(arguments: argparse.Namespace) -> "PretrainedConfig":
    from ..configuration import read_config
    from ..loading import require_token_types

    name, length = arguments.preset or arguments.config_file, arguments.max_seq_length
    if arguments.preset is not None:
        _require_preset(arguments.preset)
    try:
        config = read_config(name, pretraining_objective=arguments.task.lower())
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    if length > config.max_position_embeddings:
        raise UserError(
            f"--max_seq_length {length}: above max_position_embeddings={config.max_position_embeddings} of {name}"
        )
    if arguments.task == "SOP":
        require_token_types(config, name)
    return config


def _memory_of_a_process(asked: str | None, device: str, ranks: int) -> int:
    """Bytes: what --device_memory says, or a process's share of what is free here."""
    import torch

    from ..training.memory import MemoryMeter, parse_memory

    if asked is not None:
        return parse_memory("--device_memory", asked)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device_memory is missing: give that of a GPU, such as 80GB, for there is none here")
    return MemoryMeter(torch.device(device)).available() // (ranks if device == "cpu" else 1)


def _speeds(
    config: "PretrainedConfig", plans: "list[Plan]", length: int, steps: int, progress: "tqdm"
) -> tuple[list[float | None], list[str]]:
    """Tokens a second of each plan, measured in so many steps, and why some have none; `progress` moves by plans."""
    from ..probing import probe, why_no_probe

    speeds: list[float | None] = []
    reasons: list[str] = []
    for plan in plans:
        speed, reason = None, why_no_probe(plan) if steps else "--probe_steps 0"
        if reason is None:
            try:
                speed = probe(config, plan, length, steps)
            except UserError as error:
                reason = f"--zero {plan.setting.zero}: {error}"
        speeds.append(speed)
        reasons += [] if reason is None else [reason]
        progress.update()
    return speeds, reasons


def _require_masked_share(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.mlm_probability < 1:
        raise UserError(f"--mlm_probability {arguments.mlm_probability}: must be between 0 and 1")


def _plan_rows(
    plans: "list[Plan]", speeds: list[float | None], arguments: argparse.Namespace, length: int
) -> list[tuple[str, ...]]:
    kinds = ("parameters", "gradients", "optimizer", "activations", "exchange")
    rows = [("zero", "rows", *kinds, "peak", "most rows", "tokens/s", "hours", "")]
    texts = 1 if arguments.task == "SOP" else 2
    for plan, speed in zip(plans, speeds, strict=True):
        forward_passes = plan.setting.ranks * arguments.gradient_accumulation_steps * arguments.num_steps
        tokens = texts * length * plan.rows * forward_passes
        rows.append(
            (
                *(f"{plan.setting.zero}", f"{plan.rows:,}"),
                *(f"{getattr(plan.use, kind) / 1e6:,.0f}" for kind in kinds),
                *(f"{plan.use.total / 1e6:,.0f}", f"{plan.most_rows:,}"),
                *(("-", "-") if speed is None else (f"{speed:,.0f}", f"{tokens / speed / 3600:,.1f}")),
                f"{plan.use.moment}{'' if plan.rows <= plan.most_rows else ': does not fit'}",
            )
        )
    return rows


def _plan_flags(plan: "Plan", model_type: str, arguments: argparse.Namespace) -> str:
    """What `run_pretraining.py` is to be given for a plan, without what is its default."""
    setting = plan.setting
    source = f"--preset {arguments.preset}" if arguments.preset else f"--config_file {arguments.config_file}"
    flags = [
        *(["--family switch"] if model_type == "mixlm_switch" else []),
        *(source, f"--task {arguments.task}", f"--max_seq_length {arguments.max_seq_length}"),
        *(f"--train_batch_size {plan.rows}", f"--num_steps {arguments.num_steps}"),
    ]
    if arguments.gradient_accumulation_steps > 1:
        flags.append(f"--gradient_accumulation_steps {arguments.gradient_accumulation_steps}")
    if setting.masked_share != DEFAULT_MLM_PROBABILITY:
        flags.append(f"--mlm_probability {setting.masked_share:g}")
    if setting.zero:
        flags += [f"--zero {setting.zero}", f"--sharding_backend {setting.sharding_backend}"]
    if setting.auto_wrap and setting.zero >= 2:
        flags.append("--auto_wrap")
    if setting.precision != "fp32":
        flags.append(f"--{setting.precision}")
    if setting.muon:
        flags.append("--muon")
    return " ".join(flags)


def _model_to_profile(arguments: argparse.Namespace, length: int) -> "PreTrainedModel":
    from transformers.utils.logging import disable_progress_bar

    from ..profiling import preset_model, saved_model

    if arguments.model is not None:
        disable_progress_bar()
        return saved_model(arguments.model, length, arguments.inference)
    _require_preset(arguments.preset)
    return preset_model(arguments.preset, length, arguments.inference)


def _require_preset(name: str) -> None:
    from ..configuration import preset_names

    names = preset_names()
    if name not in names:
        hint = did_you_mean(name, names) or f"; presets: {', '.join(names)}"
        raise UserError(f"--preset {name}: unknown preset{hint}")


def _setting_rows(
    model: "PreTrainedModel", rows: int, length: int, predicted: float | None, threads: int
) -> list[tuple[str, str, str]]:
    import torch

    device = "cpu" if model.device.type == "cpu" else torch.cuda.get_device_name(model.device)
    return [
        ("parameters", f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:,.1f}M", "float32"),
        ("shape", f"{rows} x {length}", "rows x tokens"),
        *([] if predicted is None else [("to predict", f"{predicted:.0%}", "of the tokens")]),
        ("threads", f"{threads}", device),
        ("torch", torch.__version__, ""),
    ]


def _time_rows(profile: "Profile", steps: int) -> list[tuple[str, str, str]]:
    whole = profile.step_seconds
    phases = profile.phase_seconds.items() if len(profile.phase_seconds) > 1 else ()
    return [
        *((name, f"{seconds * 1000:,.1f} ms", f"{seconds / whole:.1%} of the step") for name, seconds in phases),
        ("step", f"{whole * 1000:,.1f} ms", f"median of {steps}, after one to warm up"),
        ("speed", f"{profile.tokens / whole:,.0f} tokens/s", "real tokens"),
    ]


def _arithmetic_rows(profile: "Profile") -> list[tuple[str, str, str]]:
    return [
        ("operations", f"{profile.operations / 1e9:,.3f} GFLOP", "matrix products, convolutions, fused attention"),
        ("rate", f"{profile.rate / 1e9:,.1f} GFLOP/s", ""),
        ("peak rate", f"{profile.peak_rate / 1e9:,.1f} GFLOP/s", "the fastest large matrix product here"),
        ("used", f"{profile.rate / profile.peak_rate:.1%}", "rate / peak rate"),
    ]


def _operator_rows(operators: "list[OperatorTime]", top: int) -> list[tuple[str, ...]]:
    from ..profiling import summarize_operators

    return [
        ("", "calls/step", "ms/step", "share", ""),
        *(
            (operator.name, f"{operator.calls:,.0f}", f"{operator.seconds * 1000:,.2f}", f"{operator.share:.1%}", "")
            for operator in summarize_operators(operators, top)
        ),
    ]


def _memory_rows(memory: "MemoryUse", inference: bool) -> list[tuple[str, str, str]]:
    training = [
        ("gradients", memory.gradients, ""),
        ("optimizer state", memory.optimizer_state, ""),
        ("activations", memory.activations, "kept by the forward for the backward pass"),
    ]
    rows = [
        ("parameters", memory.parameters, ""),
        *([] if inference else training),
        ("temporary", memory.temporary, "the most at a time of all other tensors"),
        ("peak", memory.peak, "the most at a time of all together; without buffers within an operator"),
    ]
    return [(name, f"{size / 2**20:,.1f} MiB", remark) for name, size, remark in rows]
