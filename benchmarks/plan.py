"""How near `mixlm plan` comes: peak memory of each engine, planned and measured on this machine's CPU.

    OMP_NUM_THREADS=1 python benchmarks/plan.py

prints the table of docs/planning.md, a line when it is measured (half an hour on a 2-core machine).
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mixlm import MixLMConfig, MixLMSwitchConfig
from mixlm.planning import Setting, make_plans
from mixlm.probing import measure
from mixlm.profiling import BERT_MASKED_SHARE
from mixlm.training import verification

SHAPE = {"hidden_size": 512, "num_hidden_layers": 6, "vocab_size": 16000, "max_position_embeddings": 512}
MIXLM = {"ff_dim": 4096, "n_experts": 4, "num_heads": 4, "kernel_size": 9}
SWITCH = {"ff_dim": 1024, "n_experts": 4, "num_heads": 8}
ENGINES = [Setting(each.zero, each.sharding_backend, each.auto_wrap, ranks=2) for each in verification.CASES]


class Case(NamedTuple):
    """A model, its batch, and how it is trained."""

    family: str
    task: str
    layer_group: int
    rows: int
    length: int
    setting: Setting


SOME = (Setting(), ENGINES[0], ENGINES[5], ENGINES[7], ENGINES[9])  # one of each kind


def cases() -> Iterator[Case]:
    """All rows of the table."""
    for setting in (Setting(), *ENGINES):
        yield Case("mixlm", "SOP", 1, 2, 64, setting)
    for setting in (Setting(), *ENGINES):
        yield Case("switch", "ICT", 3, 2, 64, setting)
    for setting in SOME:
        yield Case("mixlm", "ICT", 3, 2, 64, setting)
    for setting in SOME:
        yield Case("switch", "SOP", 1, 2, 64, setting._replace(accumulates=True))
    for setting in SOME:
        yield Case("mixlm", "SOP", 1, 16, 128, setting)  # activations are most of it
    for setting in SOME:
        yield Case("switch", "SOP", 3, 8, 128, setting._replace(precision="bf16"))


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each case."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    print("| model | task | batch | processes | engine | precision | planned MB | measured MB | difference |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in cases():
        config_class, fields = (MixLMConfig, MIXLM) if case.family == "mixlm" else (MixLMSwitchConfig, SWITCH)
        config = config_class(**SHAPE, **fields, layer_group=case.layer_group, pretraining_objective=case.task.lower())
        setting = case.setting._replace(masked_share=BERT_MASKED_SHARE)
        (plan,) = make_plans(config, case.length, [setting], case.rows, budget=0)
        planned, measured = plan.use.total, measure(config, case.rows, case.length, setting, steps=2).peak_bytes
        model = f"{case.family} {plan.numbers / 1e6:.0f}M"
        batch = f"{'2 × ' if setting.accumulates else ''}{case.rows} × {case.length}"
        engine = verification.Case(setting.zero, setting.sharding_backend, setting.auto_wrap).name
        print(
            f"| {model} | {case.task} | {batch} | {setting.ranks} | {engine} | {setting.precision} | "
            f"{planned / 1e6:,.0f} | {measured / 1e6:,.0f} | {planned / measured - 1:+.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
