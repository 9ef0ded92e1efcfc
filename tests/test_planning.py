"""What a training will need: exact where it is arithmetic, and as measured where it is not."""

import re

import pytest
import torch
from transformers import AutoModelForPreTraining

from mixlm import MixLMConfig, MixLMSwitchConfig, planning
from mixlm.cli import main
from mixlm.cli.costs import DEFAULT_MLM_PROBABILITY
from mixlm.planning import (
    BYTES,
    Setting,
    Step,
    at_rows,
    make_plans,
    owned,
    peak_use,
    simulate_step,
    unit_sizes,
)
from mixlm.probing import measure, why_no_probe
from mixlm.training.arguments import PretrainingArguments
from mixlm.training.optimization import OptimizerSettings, matrices_of
from mixlm.training.sharding import sharding_units

LENGTH = 16
TINY = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "n_experts": 2,
    "ff_dim": 64,
    "max_position_embeddings": LENGTH,
}
CONFIGS = {
    "mixlm": MixLMConfig(**TINY, kernel_size=5),
    "switch": MixLMSwitchConfig(**TINY),
    "mixlm ict shared": MixLMConfig(**TINY, kernel_size=5, layer_group=2, pretraining_objective="ict"),
    "switch ict": MixLMSwitchConfig(**TINY, pretraining_objective="ict"),
}
ENGINES = [
    Setting(zero, backend, auto_wrap, ranks=3)
    for zero in range(4)
    for backend in ("torch", "fairscale")
    for auto_wrap in (False, True)
]


@pytest.fixture(scope="module")
def tiny_step():
    return simulate_step(CONFIGS["mixlm"], 4, LENGTH, Setting())


def bytes_of(config) -> int:
    return BYTES * sum(each.numel() for each in AutoModelForPreTraining.from_config(config).parameters())


class TestStep:
    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    @pytest.mark.parametrize("setting", [Setting(), Setting(precision="bf16", device="cuda")], ids=["cpu", "cuda"])
    def test_knows_every_parameter_and_completes_each_gradient_once(self, config, setting):
        step = simulate_step(config, 4, LENGTH, setting)
        model = AutoModelForPreTraining.from_config(config)
        in_order = [each for group in OptimizerSettings(0.0, 0.0, 0.0).groups(model) for each in group["params"]]
        assert [each.shape for each in step.parameters] == [each.shape for each in in_order]
        assert {each.unit for each in step.parameters} == set(range(len(sharding_units(model))))
        assert sorted(number for number, _ in step.backward) == list(range(len(in_order)))

    def test_takes_no_memory_of_the_model(self):
        config = MixLMConfig(**{**TINY, "vocab_size": 10**9}, kernel_size=5)  # 128 GB
        assert simulate_step(config, 1, LENGTH, Setting()).parameters[0].size == 128 * 10**9

    def test_leaves_the_configuration_as_it_is(self):
        config = MixLMConfig(**TINY, kernel_size=5)
        simulate_step(config, 1, LENGTH, Setting(device="cuda"))
        assert config.kernels == "auto"

    def test_grows_along_a_line_in_the_rows(self):
        first, second, third = (simulate_step(CONFIGS["mixlm"], rows, LENGTH, Setting()) for rows in (20, 40, 80))
        assert at_rows([first, second], 20) == first
        line = at_rows([first, second], 80)
        assert line.rows == 80
        assert line.forward == pytest.approx(third.forward, rel=0.01)
        for (number, alive), (other, expected) in zip(line.backward, third.backward, strict=True):
            assert number == other and alive == pytest.approx(expected, rel=0.01)

    def test_is_smaller_in_16_bits_and_with_fused_kernels(self):
        config = MixLMConfig(**{**TINY, "hidden_size": 384, "ff_dim": 768}, kernel_size=5)
        plain = MixLMConfig(**{**TINY, "hidden_size": 384, "ff_dim": 768}, kernel_size=5, kernels="plain")
        fused = simulate_step(config, 64, LENGTH, Setting()).forward
        # Of the feed-forward's width, each of the two layers keeps one activation rather than two.
        width = 768 * BYTES * 64 * LENGTH
        assert fused < simulate_step(plain, 64, LENGTH, Setting()).forward - 2 * width
        assert simulate_step(config, 64, LENGTH, Setting(precision="bf16")).forward < fused


class TestEngines:
    """Three ranks, which do not divide the shapes."""

    @pytest.mark.parametrize("ranks", [1, 3])
    def test_zero_0_keeps_everything(self, tiny_step, ranks):
        everything = bytes_of(CONFIGS["mixlm"])
        use = peak_use(tiny_step, Setting(ranks=ranks))
        assert (use.parameters, use.optimizer) == (everything, 2 * everything)
        assert use.gradients == everything if ranks == 3 else use.gradients <= everything

    @pytest.mark.parametrize("zero", [1, 2, 3])
    def test_one_process_has_nothing_to_share_out(self, tiny_step, zero):
        assert peak_use(tiny_step, Setting(zero, auto_wrap=True)) == peak_use(tiny_step, Setting())

    @pytest.mark.parametrize("backend", ["torch", "fairscale"])
    def test_zero_1_shares_out_the_moments_by_parameter(self, tiny_step, backend):
        everything = bytes_of(CONFIGS["mixlm"])
        setting = Setting(1, backend, ranks=3)
        parts = owned(tiny_step.parameters, setting)
        assert sorted(number for part in parts for number in part) == list(range(len(tiny_step.parameters)))
        largest = max(sum(tiny_step.parameters[number].size for number in part) for part in parts)
        use = peak_use(tiny_step, setting)
        assert (use.parameters, use.gradients, use.optimizer) == (everything, everything, 2 * largest)
        assert everything / 3 <= largest < everything / 2

    @pytest.mark.parametrize("setting", [each for each in ENGINES if each.is_fully_sharded], ids=str)
    def test_full_sharding_keeps_a_third(self, tiny_step, setting):
        model = AutoModelForPreTraining.from_config(CONFIGS["mixlm"])
        units = sharding_units(model) if setting.auto_wrap else sharding_units(model)[-1:]
        if setting.sharding_backend == "torch":  # the first dimension of each parameter in three
            part = sum(-(-len(each) // 3) * each[0].numel() * BYTES for each in model.parameters())
        elif setting.auto_wrap:  # the numbers of each unit in three
            part = sum(-(-unit.numel // 3) * BYTES for unit in units)
        else:
            part = -(-sum(each.numel() for each in model.parameters()) // 3) * BYTES
        assert sum(unit_sizes(tiny_step.parameters, setting)) == 3 * part
        large = at_rows([tiny_step, simulate_step(CONFIGS["mixlm"], 8, LENGTH, setting)], 64)
        use = peak_use(large, setting)
        assert (use.parameters, use.optimizer) == (part, 2 * part)
        assert use.gradients <= part

    def test_what_is_shared_out_is_what_the_issue_says(self, tiny_step):
        full = {(each.zero, *each[1:3]) for each in ENGINES if each.is_fully_sharded}
        expected = {(2, "fairscale", True)}
        expected |= {(zero, "torch", wrap) for zero in (2, 3) for wrap in (False, True)}
        expected |= {(3, "fairscale", wrap) for wrap in (False, True)}
        assert full == expected

    @pytest.mark.parametrize("zero", [0, 2])
    def test_muon_keeps_one_moment_of_a_matrix(self, zero):
        """And needs memory for the largest, which is gathered where every rank has a part of it."""
        setting = Setting(zero, ranks=3, muon=True)
        step = simulate_step(CONFIGS["mixlm"], 4, LENGTH, setting)
        model = AutoModelForPreTraining.from_config(CONFIGS["mixlm"])
        matrices = matrices_of(model)
        moments = {each: 1 if each in matrices else 2 for each in model.parameters()}
        largest = BYTES * max(each.numel() for each in matrices)
        assert step.update >= 2 * largest  # its momentum, and what becomes of it
        assert at_rows([step, step._replace(rows=8)], 6).update == step.update
        small = step._replace(forward=0, backward=[], update=10**9)
        use = peak_use(small, setting)
        assert use.moment == "update" and use.activations == 10**9
        assert use.exchange == (largest if zero == 2 else 0)
        if zero == 0:
            assert use.optimizer == BYTES * sum(number * each.numel() for each, number in moments.items())
        else:  # the first dimension of each in three
            parts = [number * -(-len(each) // 3) * each[0].numel() for each, number in moments.items()]
            assert use.optimizer == BYTES * sum(parts)

    def test_most_moments_are_not_with_who_owns_most(self):
        """The owner of the embeddings has two for each number, that of the matrices one."""
        setting = Setting(1, ranks=2, muon=True)
        step = simulate_step(MixLMConfig(**{**TINY, "vocab_size": 200}, kernel_size=5), 4, LENGTH, setting)
        parts = [[step.parameters[number] for number in part] for part in owned(step.parameters, setting)]
        with_embeddings, with_matrices = ([each.moments * each.size for each in part] for part in parts)
        assert sum(each.size for each in parts[1]) > sum(each.size for each in parts[0])
        assert peak_use(step, setting).optimizer == sum(with_embeddings) > sum(with_matrices)

    def test_accumulating_keeps_whole_gradients_until_they_are_exchanged(self, tiny_step):
        for setting in (Setting(), *ENGINES):
            more = peak_use(tiny_step, setting._replace(accumulates=True)).total
            assert more >= peak_use(tiny_step, setting).total

    def test_every_rank_makes_the_whole_model_first(self, tiny_step):
        everything = bytes_of(CONFIGS["mixlm"])
        small = tiny_step._replace(forward=0, backward=[])
        use = peak_use(small, Setting(3, "torch", auto_wrap=True, ranks=1000, device="cuda"))
        assert use.moment == "start" and use.parameters >= everything


SIMULATED: dict[tuple, Step] = {}  # steps of the tests that follow


class TestPlans:
    @pytest.fixture
    def plans_of(self, monkeypatch):
        """(settings, rows, budget) -> plans of a model whose parameters are most of it."""
        config = MixLMConfig(**{**TINY, "vocab_size": 20_000}, kernel_size=5)

        def remembered(config, rows: int, length: int, setting: Setting) -> Step:
            key = (rows, setting.is_wrapped, setting.device)
            if key not in SIMULATED:
                SIMULATED[key] = simulate_step(config, rows, length, setting)
            return SIMULATED[key]

        monkeypatch.setattr(planning, "simulate_step", remembered)
        return lambda settings, rows, budget: list(make_plans(config, LENGTH, settings, rows, budget))

    def test_the_largest_batch_fits_and_the_next_does_not(self, plans_of):
        settings = [Setting(zero, ranks=4) for zero in range(4)]
        budget = 30_000_000
        for plan in plans_of(settings, 0, budget):
            assert plan.rows == plan.most_rows > 0 and plan.use.total <= budget
            (next_plan,) = plans_of([plan.setting], plan.rows + 1, budget)
            assert next_plan.use.total > budget and next_plan.rows > next_plan.most_rows

    def test_more_memory_and_more_zero_are_never_fewer_rows(self, plans_of):
        settings = [Setting(zero, ranks=4, device="cuda") for zero in (0, 1)]
        found = [[plan.most_rows for plan in plans_of(settings, 0, budget)] for budget in (2e7, 3e7, 4e7)]
        assert found == sorted(found) and all(rows == sorted(rows) for rows in found)
        assert found[0] < found[-1]

    def test_more_ranks_are_never_more_memory(self, plans_of):
        for zero in range(4):
            settings = [Setting(zero, ranks=ranks, auto_wrap=True) for ranks in (2, 4, 8, 64)]
            totals = [plan.use.total for plan in plans_of(settings, 4, 0)]
            assert totals == sorted(totals, reverse=True)

    def test_nothing_fits(self, plans_of):
        (plan,) = plans_of([Setting()], 0, 1000)
        assert (plan.rows, plan.most_rows) == (1, 0) and plan.use.total > 1000

    def test_why_there_is_no_probe(self, plans_of, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr("os.cpu_count", lambda: 2)
        fits, many, other, large = plans_of([Setting(), Setting(ranks=3), Setting(device="cuda"), Setting()], 1, 10**9)
        assert why_no_probe(fits) is None
        assert why_no_probe(many) == "3 processes are planned, and this machine has 2 cores"
        assert why_no_probe(other) == "planned for cuda, and this machine trains on cpu"
        assert why_no_probe(large._replace(most_rows=0)) == "--zero 0 does not fit on this machine"


def config_of_measurements(family: str, task: str):
    config_class = MixLMConfig if family == "mixlm" else MixLMSwitchConfig
    fields = {"kernel_size": 9} if family == "mixlm" else {}
    return config_class(
        hidden_size=512,
        num_hidden_layers=4,
        num_heads=4,
        ff_dim=2048,
        vocab_size=16000,
        max_position_embeddings=128,
        pretraining_objective=task,
        **fields,
    )


def difference(family: str, task: str, setting: Setting, rows: int = 2, length: int = 64) -> float:
    """Of the planned from the measured peak, relative."""
    config = config_of_measurements(family, task)
    (plan,) = make_plans(config, length, [setting], rows, 0)
    return plan.use.total / measure(config, rows, length, setting, steps=1).peak_bytes - 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the memory of CPUs")
class TestMeasured:
    def test_one_process(self):
        assert abs(difference("mixlm", "sop", Setting())) < 0.15

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "setting",
        [
            Setting(muon=True),
            Setting(1, muon=True, ranks=2),
            Setting(3, muon=True, ranks=2, auto_wrap=True),
        ],
        ids=lambda setting: f"{setting.zero}",
    )
    def test_muon(self, setting):
        assert abs(difference("mixlm", "sop", setting)) < 0.15

    @pytest.mark.slow
    @pytest.mark.parametrize("family, task", [("mixlm", "ict"), ("switch", "sop")])
    @pytest.mark.parametrize(
        "setting",
        [each._replace(ranks=2) for each in ENGINES if each.zero >= 2 or not each.auto_wrap],
        ids=lambda setting: f"{setting.zero}-{setting.sharding_backend}-{setting.auto_wrap}",
    )
    def test_every_engine(self, family, task, setting):
        assert abs(difference(family, task, setting)) < 0.15


class TestVerb:
    @pytest.fixture
    def plan(self, capsys, monkeypatch):
        """Options -> what is printed."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

        def run(*options: str) -> str:
            main(["plan", "--preset", "mixlm-tiny", "--probe_steps", "0", "--max_seq_length", "16", *options])
            return capsys.readouterr().out

        return run

    @pytest.fixture
    def refused(self, capsys, monkeypatch):
        """Options -> the line of the error."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

        def run(*options: str) -> str:
            with pytest.raises(SystemExit) as error:
                main(["plan", *options])
            assert error.value.code == 2
            # A slow machine has lines of progress before it.
            (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            return line

        return run

    def test_shows_every_zero_and_what_to_give(self, plan):
        output = plan("--world_size", "8", "--device_memory", "100MB", "--device", "cuda", "--bf16", "--auto_wrap")
        what = "mixlm-tiny: 811,170 parameters, SOP, bf16, 16 tokens a row, 40% to predict, 8 processes on cuda\n"
        assert output.startswith(what)
        assert "A process may use 90 of 100 MB" in output
        rows = [line.split() for line in output.splitlines() if re.match(r" +[0-3] ", line)]
        assert [row[0] for row in rows] == ["0", "1", "2", "3"]
        for row in rows:
            peak = sum(int(cell.replace(",", "")) for cell in row[2:7])
            assert abs(int(row[7]) - peak) <= 3  # each is rounded
        batch = int(rows[0][1].replace(",", ""))
        *_, verdict, flags = output.splitlines()
        assert verdict.startswith("--zero 0 is enough")
        expected = f"--preset mixlm-tiny --task SOP --max_seq_length 16 --train_batch_size {batch} --num_steps 10000"
        assert flags.split() == [*expected.split(), "--bf16"]

    def test_more_tokens_to_predict_need_more_memory(self, plan):
        def activations(*options: str) -> tuple[int, str]:
            output = plan("--train_batch_size", "512", "--device_memory", "1GB", *options)
            (row,) = re.findall(r"^ +0 .*", output, flags=re.MULTILINE)
            return int(row.split()[5].replace(",", "")), output

        assert DEFAULT_MLM_PROBABILITY == PretrainingArguments.mlm_probability
        usual, output = activations()
        fewer, output_with_fewer = activations("--mlm_probability", "0.15")
        # Scores of the vocabulary and their gradient, or copies of them, are alive at once.
        assert usual - fewer > 2 * 0.25 * 512 * 16 * 4000 * 4 / 1e6
        assert "--mlm_probability" not in output and "--mlm_probability 0.15" in output_with_fewer

    def test_muon_needs_less_and_is_among_the_flags(self, plan):
        needed = []
        for options in ((), ("--muon",)):
            output = plan("--preset", "mixlm-mini", "--train_batch_size", "1", *options)
            (row,) = re.findall(r"^ +0 .*", output, flags=re.MULTILINE)
            needed.append(int(row.split()[4].replace(",", "")))
            assert output.rstrip().endswith("--muon") == ("Muon" in output) == bool(options)
        assert needed[1] < needed[0]

    def test_names_the_smallest_zero_that_fits(self, plan):
        common = ("--world_size", "2", "--train_batch_size", "1")
        output = plan(*common, "--device_memory", "20MB")
        assert "--zero 1 is enough" in output and "does not fit" in output
        assert output.rstrip().endswith("--zero 1 --sharding_backend torch")

    def test_one_process_is_planned_with_zero_0_alone(self, plan):
        output = plan("--device_memory", "1GB")
        assert len(re.findall(r"^ +\d ", output, flags=re.MULTILINE)) == 1
        assert "every --zero is as 0" in plan("--device_memory", "1GB", "--zero", "3")

    def test_a_configuration_file_of_the_other_family(self, capsys, tmp_path):
        CONFIGS["switch"].save_pretrained(tmp_path)
        file = str(tmp_path / "config.json")
        main(
            ["plan", "--config_file", file, "--task", "ICT", "--max_seq_length", "16"]
            + ["--device_memory", "1GB", "--probe_steps", "0", "--device", "cpu"]
        )
        assert f"--family switch --config_file {file} --task ICT" in capsys.readouterr().out

    def test_sentence_order_needs_two_token_types(self, refused, capsys, tmp_path):
        MixLMConfig(**TINY, kernel_size=5, type_vocab_size=1).save_pretrained(tmp_path)
        file = str(tmp_path / "config.json")
        options = ("--config_file", file, "--max_seq_length", "16", "--device_memory", "1GB", "--probe_steps", "0")
        line = refused(*options)
        assert line.startswith(f"error: {file}: type_vocab_size=1, but --task SOP") and "--task ICT" in line
        main(["plan", *options, "--task", "ICT", "--device", "cpu"])
        assert "--zero 0 is enough" in capsys.readouterr().out

    def test_wrong_numbers(self, refused):
        for option, value in (
            *(("--world_size", "0"), ("--train_batch_size", "-1"), ("--max_seq_length", "3")),
            *(("--num_steps", "0"), ("--gradient_accumulation_steps", "0"), ("--probe_steps", "-1")),
        ):
            assert f"{option} {value}: must be from" in refused("--preset", "mixlm-tiny", option, value)

    def test_wrong_names_and_sizes(self, refused):
        assert "did you mean mixlm-tiny?" in refused("--preset", "mixlm-tinny")
        assert "neither a file nor a preset" in refused("--config_file", "nowhere.json")
        assert "--device_memory='0'" in refused("--preset", "mixlm-tiny", "--device_memory", "0")
        assert "--device_memory='much'" in refused("--preset", "mixlm-tiny", "--device_memory", "much")
        assert "--mlm_probability 1.0: must be" in refused("--preset", "mixlm-tiny", "--mlm_probability", "1")
        assert "max_position_embeddings=256" in refused("--preset", "mixlm-tiny", "--max_seq_length", "257")
        assert "not allowed with" in refused("--preset", "mixlm-tiny", "--fp16", "--bf16")
        assert "not allowed with" in refused("--preset", "mixlm-tiny", "--config_file", "some.json")
        fairscale = ("--world_size", "2", "--sharding_backend", "fairscale")
        assert "--sharding_backend torch can" in refused("--preset", "mixlm-tiny", "--muon", *fairscale)
        assert "--device_memory is missing" in refused("--preset", "mixlm-tiny", "--device", "cuda")

    def test_nothing_fits(self, refused):
        line = refused("--preset", "mixlm-tiny", "--device_memory", "1MB", "--max_seq_length", "16")
        assert line.startswith("error: nothing fits: with --zero 0 a process needs") and "may use 1;" in line

    @pytest.mark.slow
    def test_the_probe(self, capsys):
        main(
            ["plan", "--preset", "mixlm-tiny", "--max_seq_length", "16", "--train_batch_size", "2"]
            + ["--probe_steps", "2"]
        )
        output = capsys.readouterr().out
        (row,) = re.findall(r"^ +0 .*", output, flags=re.MULTILINE)
        speed, hours = row.split()[9:11]
        assert float(hours) == pytest.approx(10_000 * 32 / float(speed.replace(",", "")) / 3600, abs=0.06)
