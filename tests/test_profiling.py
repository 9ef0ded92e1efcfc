"""What `mixlm profile` measures, against numbers known beforehand, and what it prints and refuses."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig

from mixlm import (
    MixLMConfig,
    MixLMForPreTraining,
    MixLMSwitchConfig,
    MixLMSwitchForPreTraining,
    MixLMSwitchModel,
    profiling,
)
from mixlm.cli import main
from mixlm.heads import IGNORE
from mixlm.profiling import (
    TrainingStep,
    count_operations,
    measure_memory,
    preset_model,
    profile_step,
    random_batch,
    run,
    summarize_operators,
    time_operators,
)

CPU = torch.device("cpu")
FAMILIES = pytest.mark.parametrize(
    ("config_class", "model_class", "preset"),
    [
        (MixLMConfig, MixLMForPreTraining, "mixlm-tiny"),
        (MixLMSwitchConfig, MixLMSwitchForPreTraining, "mixlm-switch-tiny"),
    ],
    ids=["mixlm", "switch"],
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The peak rate from matrices that take no time."""
    monkeypatch.setattr(profiling, "MATRIX_SIZE", 64)
    torch.manual_seed(0)


def training_step(model, rows: int = 2, length: int = 16) -> TrainingStep:
    return TrainingStep(model, random_batch(model.config, rows, length))


class TestRandomBatch:
    @pytest.mark.parametrize(("objective", "prefixes"), [("sop", [""]), ("ict", ["", "context_"])])
    def test_is_what_the_objective_takes(self, objective, prefixes):
        config = MixLMConfig.from_preset("mixlm-tiny", pretraining_objective=objective)
        batch = random_batch(config, 4, 10)
        for prefix in prefixes:
            labels = batch[f"{prefix}labels"]
            assert labels.shape == batch[f"{prefix}input_ids"].shape == (4, 10)
            assert (labels != IGNORE).sum() == 6  # 15% of 40
            assert torch.equal(labels[labels != IGNORE], batch[f"{prefix}input_ids"][labels != IGNORE])
        assert MixLMForPreTraining(config)(**batch).loss.isfinite()

    def test_the_smallest(self):
        config = MixLMConfig.from_preset("mixlm-tiny", type_vocab_size=1)
        batch = random_batch(config, 1, 1)
        assert (batch["labels"] != IGNORE).sum() == 1
        assert MixLMForPreTraining(config)(**batch).loss.isfinite()


class KeptOnContext(torch.autograd.Function):
    """exp, which keeps its output without torch's knowledge."""

    @staticmethod
    def forward(ctx, inputs):
        ctx.kept = inputs.exp()
        return ctx.kept.sum()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.kept * gradient


class TestMeasureMemory:
    @pytest.mark.parametrize("function", [lambda product: product.exp().sum(), KeptOnContext.apply])
    def test_by_hand(self, function):
        """Inputs [32, 8] through a weight [8, 16], with exp as the only thing to keep."""
        weight, inputs = nn.Parameter(torch.zeros(8, 16)), torch.zeros(32, 8)
        kept, loss, gradient = 32 * 16 * 4, 4, 8 * 16 * 4

        class Step:
            model, optimizer = SimpleNamespace(parameters=lambda: [weight]), None

            def __init__(self):
                self.phases = {"forward": self.forward, "backward": self.backward}

            def forward(self):
                self.loss = function(inputs @ weight)

            def backward(self):
                self.loss.backward()
                del self.loss

        memory = measure_memory(Step())
        assert memory.parameters == memory.gradients == gradient
        assert memory.activations == kept + loss
        assert memory.optimizer_state == 0
        # In the backward pass the gradient by the product, with the ones it starts from.
        assert kept <= memory.temporary <= kept + 2 * loss
        # The forward pass has the product and its exp, the backward pass the exp and its gradient.
        assert memory.peak >= gradient + 2 * kept

    @FAMILIES
    def test_activations_grow_linearly_with_the_layers(self, config_class, model_class, preset):
        fields = {"capacity_factor": 4.0} if config_class is MixLMSwitchConfig else {}
        kept = []
        for layers in (2, 4, 6):
            model = model_class(config_class.from_preset(preset, num_hidden_layers=layers, layer_group=2, **fields))
            kept.append(measure_memory(training_step(model)).activations)
        assert 0 < kept[1] - kept[0] == kept[2] - kept[1]

    @FAMILIES
    def test_of_a_training_step(self, config_class, model_class, preset):
        model = model_class(config_class.from_preset(preset))
        step = training_step(model)
        run(step)
        memory = measure_memory(step)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        assert memory.parameters == memory.gradients == 4 * parameters
        # Two moments of each parameter, and a step counter for each tensor.
        assert memory.optimizer_state == 8 * parameters + 4 * len(list(model.parameters()))
        lasting = memory.parameters + memory.optimizer_state
        assert lasting + max(memory.gradients, memory.activations) <= memory.peak
        assert memory.peak <= lasting + memory.gradients + memory.activations + memory.temporary

    def test_is_the_same_each_time(self):
        step = training_step(MixLMForPreTraining(MixLMConfig.from_preset("mixlm-tiny")))
        run(step)
        assert measure_memory(step) == measure_memory(step)


def product_in_place() -> torch.Tensor:
    return torch.zeros(3, 4, 6).baddbmm_(torch.zeros(3, 4, 5), torch.zeros(3, 5, 6))


class Product(torch.autograd.Function):
    """A product [4, 5] x [5, 6] whose sum is added to in place."""

    @staticmethod
    def forward(ctx, left, right):
        ctx.save_for_backward(left, right)
        return torch.zeros(4, 6).addmm_(left, right)

    @staticmethod
    def backward(ctx, gradient):
        left, right = ctx.saved_tensors
        return gradient @ right.T, left.T @ gradient


class TestCountOperations:
    def test_of_products(self):
        assert count_operations(lambda: nn.Linear(5, 6)(torch.zeros(4, 5))) == 2 * 4 * 5 * 6
        assert count_operations(product_in_place) == 3 * 2 * 4 * 5 * 6

    def test_of_a_custom_function(self):
        left, right = (torch.zeros(shape, requires_grad=True) for shape in ((4, 5), (5, 6)))
        assert count_operations(lambda: Product.apply(left, right).sum().backward()) == 3 * 2 * 4 * 5 * 6

    @pytest.mark.parametrize("groups", [1, 2, 4])
    @pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
    def test_of_grouped_convolutions(self, groups, kind):
        """Forward, the gradient by the inputs and that by the weight take equally many."""
        inputs = torch.zeros(2, 8, 10, requires_grad=True)
        convolution = kind(8, 12, 5, padding=2, groups=groups)
        forward = 2 * (2 * 10) * 5 * 8 * 12 // groups
        assert count_operations(lambda: convolution(inputs)) == forward
        assert count_operations(lambda: convolution(inputs).sum().backward()) == 3 * forward
        assert count_operations(lambda: convolution(inputs.detach()).sum().backward()) == 2 * forward

    def test_of_attention(self):
        tensors = [torch.zeros(2, 3, 16, 8, requires_grad=True) for _ in range(3)]
        forward = 2 * 2 * (2 * 3) * 16 * 16 * 8
        assert count_operations(lambda: F.scaled_dot_product_attention(*tensors)) == forward
        # Backward: four products, and the scores once more.
        both = count_operations(lambda: F.scaled_dot_product_attention(*tensors).sum().backward())
        assert both == forward + 5 * forward // 2


class TestOperators:
    def test_calls_and_shares(self):
        matrix = torch.zeros(8, 8)
        operators = time_operators(lambda: (matrix @ matrix, matrix @ matrix), 3, CPU)
        assert {operator.name: operator.calls for operator in operators}["aten::mm"] == 2
        assert sum(operator.share for operator in operators) == pytest.approx(1)
        assert operators == sorted(operators, key=lambda operator: -operator.seconds)

    def test_the_rest_is_one(self):
        operators = time_operators(lambda: torch.zeros(8, 8) @ torch.zeros(8, 8), 2, CPU)
        summary = summarize_operators(operators, 1)
        assert [summary[0], "others"] == [operators[0], summary[1].name]
        assert sum(operator.share for operator in summary) == pytest.approx(1)
        assert sum(operator.seconds for operator in summary) == pytest.approx(sum(o.seconds for o in operators))
        assert summarize_operators(operators, len(operators)) == operators


@pytest.mark.parametrize("objective", ["sop", "ict"])
def test_a_profile_is_consistent(objective):
    config = MixLMConfig.from_preset("mixlm-tiny", pretraining_objective=objective)
    profile = profile_step(training_step(MixLMForPreTraining(config)), steps=1)
    assert profile.tokens == (32 if objective == "sop" else 64)
    assert list(profile.phase_seconds) == ["forward", "backward", "optimizer"]
    assert sum(profile.phase_seconds.values()) == pytest.approx(profile.step_seconds)
    assert profile.rate * profile.step_seconds == pytest.approx(profile.operations)
    assert sum(operator.share for operator in profile.operators) == pytest.approx(1)


SECTIONS = ["time", "arithmetic", "operators", "memory"]
TRAINING_ROWS = ["forward", "backward", "optimizer", "gradients", "optimizer state", "activations"]
ROWS = ["parameters", "shape", "threads", "torch", "step", "speed", "operations", "rate", "used", "others", "peak"]


def rows_of(printed: str) -> list[str]:
    """What the indented lines begin with."""
    return [line.strip().split("  ")[0] for line in printed.splitlines() if line.startswith("  ")]


class TestCommand:
    @pytest.mark.parametrize("preset", ["mixlm-tiny", "mixlm-switch-tiny"])
    def test_training_step(self, preset, capsys):
        main(["profile", "--preset", preset, "--shape", "2x16", "--steps", "1", "--top", "3", "--device", "cpu"])
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        assert lines[0] == f"{preset}: SOP training step"
        assert [line for line in lines if line and not line.startswith(" ")][1:] == SECTIONS
        assert {*ROWS, *TRAINING_ROWS} <= set(rows_of(captured.out))
        operators = lines[lines.index("operators") + 1 : lines.index("memory") - 1]
        assert len(operators) == 1 + 3 + 1
        assert len({len(line) for line in operators}) == 1  # aligned
        shares = [float(line.split()[-1].removesuffix("%")) for line in operators[1:]]
        assert sum(shares) == pytest.approx(100, abs=0.3)
        assert "GFLOP" in captured.out and captured.err == ""

    def test_inference_and_a_text_longer_than_the_preset_has(self, capsys):
        assert MixLMConfig.from_preset("mixlm-tiny").max_position_embeddings < 300
        options = ["--shape", "1x300", "--steps", "1", "--inference", "--device", "cpu"]
        main(["profile", "--preset", "mixlm-tiny", *options])
        printed = capsys.readouterr().out
        assert printed.startswith("mixlm-tiny: encoder forward\n")
        assert set(ROWS) <= set(rows_of(printed)) and not set(TRAINING_ROWS) & set(rows_of(printed))

    @pytest.mark.parametrize("inference", [False, True])
    def test_saved_model(self, inference, tmp_path, capsys):
        config = MixLMSwitchConfig.from_preset("mixlm-switch-tiny", pretraining_objective="ict")
        MixLMSwitchForPreTraining(config).save_pretrained(tmp_path)
        options = ["--shape", "2x16", "--steps", "1", "--device", "cpu", *(["--inference"] if inference else [])]
        capsys.readouterr()
        main(["profile", "--model", str(tmp_path), *options])
        expected = "encoder forward" if inference else "ICT training step"
        assert capsys.readouterr().out.startswith(f"{tmp_path}: {expected}\n")


def test_the_model_for_inference_is_the_encoder():
    model = preset_model("mixlm-switch-tiny", 16, inference=True)
    assert type(model) is MixLMSwitchModel


class TestRefused:
    @pytest.fixture
    def refused(self, capsys):
        """Run `mixlm profile` with options that it must refuse; returns the one line it says."""

        def run(*options: str) -> str:
            capsys.readouterr()
            with pytest.raises(SystemExit) as exit_:
                main(["profile", *map(str, options)])
            captured = capsys.readouterr()
            assert exit_.value.code == 2
            assert captured.out == ""
            assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
            return captured.err

        return run

    @pytest.mark.parametrize("shape", ["8by128", "0x128", "8x0", "8", "8x-1", "8x128x2", "8x" + "9" * 30, ""])
    def test_shape(self, refused, shape):
        assert f"--shape {shape}: give rows x tokens" in refused("--preset", "mixlm-tiny", f"--shape={shape}")

    @pytest.mark.parametrize("option", ["--threads", "--steps", "--top"])
    def test_numbers_below_1(self, refused, option):
        assert f"{option} 0: must be 1 or more" in refused("--preset", "mixlm-tiny", option, "0")

    def test_preset(self, refused):
        assert "did you mean mixlm-switch-tiny?" in refused("--preset", "mixlm-swich-tiny")
        assert "mixlm-base" in refused("--preset", "something")

    def test_neither_preset_nor_model_or_both(self, refused):
        assert "--preset --model is required" in refused()
        assert "not allowed with" in refused("--preset", "mixlm-tiny", "--model", "folder")

    def test_a_text_longer_than_a_saved_model_takes(self, refused, tmp_path):
        MixLMConfig.from_preset("mixlm-tiny").save_pretrained(tmp_path)
        line = refused("--model", tmp_path, "--shape", "1x257")
        assert f"--model {tmp_path}: takes 256 tokens, --shape has 257 a row" in line

    def test_a_model_that_is_none_of_ours(self, refused, tmp_path):
        BertConfig().save_pretrained(tmp_path)
        assert "is of type bert; give one of mixlm or mixlm_switch" in refused("--model", tmp_path)

    def test_a_folder_without_a_model(self, refused, tmp_path):
        assert f"{tmp_path}: cannot be loaded" in refused("--model", tmp_path)

    def test_a_configuration_that_is_wrong_or_of_another_model(self, refused, tmp_path):
        config = MixLMConfig.from_preset("mixlm-tiny")
        MixLMForPreTraining(config).save_pretrained(tmp_path)
        fields = json.loads((tmp_path / "config.json").read_text("utf-8"))
        for changes, message in (
            ({"kernel_size": 4}, "kernel_size=4 must be odd"),
            ({"hidden_size": 64}, "its weights do not have the shapes that its config.json says"),
        ):
            (tmp_path / "config.json").write_text(json.dumps({**fields, **changes}), "utf-8")
            line = refused("--model", tmp_path, "--shape", "1x8")
            assert f"{tmp_path}: cannot be loaded" in line and message in line

    def test_no_cuda(self, refused, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "no CUDA device" in refused("--preset", "mixlm-tiny", "--device", "cuda")

    def test_more_than_the_memory(self, refused):
        line = refused("--preset", "mixlm-tiny", "--shape", "999999x999999", "--device", "cpu")
        assert "--shape 999999x999999: too large for the memory of cpu" in line


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(capsys):
    main(["profile", "--preset", "mixlm-tiny", "--shape", "2x16", "--steps", "1", "--device", "cuda"])
    assert {*ROWS, *TRAINING_ROWS} <= set(rows_of(capsys.readouterr().out))
