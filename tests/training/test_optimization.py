import json
import math

import pytest
import torch
from torch import nn

from mixlm.training.optimization import AdamW, learning_rate_factor
from mixlm.training.precision import LossScale


def groups_by_name(model) -> dict[str, float]:
    """Parameter name -> weight decay; every parameter has to be in exactly one group."""
    optimizer = AdamW(learning_rate=0.1, weight_decay=0.3, epsilon=1e-7).build(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [
        (names[parameter], group["weight_decay"]) for group in optimizer.param_groups for parameter in group["params"]
    ]
    assert len(found) == len(dict(found)) == len(names)
    return dict(found)


@pytest.mark.parametrize("task", ["SOP", "ICT"])
@pytest.mark.parametrize("family", ["mixlm", "switch"])
@pytest.mark.parametrize(
    "fields", [{}, {"layer_group": 2}, {"layer_group": 2, "shared_parameters": "ffn", "ln_pos": 1}]
)
def test_biases_and_layer_norms_do_not_decay_and_all_else_does(make_model, family, task, fields):
    model = make_model(family, task, **fields)
    decay = groups_by_name(model)
    norms = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters()
    }
    assert norms
    for name, value in decay.items():
        assert value == (0.0 if name in norms or name.endswith("bias") else 0.3), name


def test_the_stacked_expert_biases_do_not_decay_and_their_weights_do(make_model):
    decay = groups_by_name(make_model("switch"))
    for end, expected in (("up_bias", 0.0), ("down_bias", 0.0), ("up_weight", 0.3), ("down_weight", 0.3)):
        values = [value for name, value in decay.items() if name.endswith(f"experts.{end}")]
        assert values == [expected] * 2


def test_the_tied_decoder_is_there_once_and_decays(make_model):
    model = make_model()
    assert model.mlm_head.decoder.weight is model.encoder.embeddings.word_embeddings.weight
    decay = groups_by_name(model)
    assert decay["encoder.embeddings.word_embeddings.weight"] == 0.3
    assert "mlm_head.decoder.weight" not in decay
    assert decay["mlm_head.decoder.bias"] == 0.0


def test_settings_reach_adamw(make_model):
    optimizer = AdamW(learning_rate=0.1, weight_decay=0.3, epsilon=1e-7).build(make_model())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {(group["lr"], group["eps"], group["betas"]) for group in optimizer.param_groups} == {
        (0.1, 1e-7, (0.9, 0.999))
    }


def test_learning_rate_without_warm_up():
    assert [learning_rate_factor(step, 0, 4) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_learning_rate_with_warm_up():
    expected = [1 / 4, 2 / 4, 3 / 4, 1.0, 4 / 5, 3 / 5, 2 / 5, 1 / 5, 0.0]
    assert [learning_rate_factor(step, 3, 8) for step in range(9)] == pytest.approx(expected)


def test_learning_rate_that_stays_at_its_peak_before_it_falls():
    expected = [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0, 1.0, 3 / 4, 2 / 4, 1 / 4, 0.0]
    assert [learning_rate_factor(step, 2, 10, 0.4) for step in range(11)] == pytest.approx(expected)
    # There is no time for a decay of 9 steps after 2 of warm-up: it begins at once.
    longest = [learning_rate_factor(step, 2, 10, 0.9) for step in range(11)]
    assert longest == [learning_rate_factor(step, 2, 10) for step in range(11)]


def test_learning_rate_of_a_longer_schedule_never_reaches_zero():
    factors = [learning_rate_factor(step, 2, 100) for step in range(10)]
    assert factors[-1] == pytest.approx((100 - 9) / 98)
    assert min(factors) > 0


@pytest.mark.parametrize("warmup_steps", [4, 5, 50])
def test_warm_up_as_long_as_the_schedule_only_rises(warmup_steps):
    factors = [learning_rate_factor(step, warmup_steps, 4) for step in range(4)]
    assert factors == pytest.approx([(step + 1) / (warmup_steps + 1) for step in range(4)])


@pytest.mark.parametrize("overflow", [math.inf, -math.inf, math.nan])
def test_the_loss_scale_is_halved_by_a_gradient_that_is_no_number(overflow):
    scale = LossScale(initial=8.0)
    assert [scale.update(norm) for norm in (1.0, overflow, overflow)] == [True, False, False]
    assert (scale.value, scale.skipped_in_a_row) == (2.0, 2)
    assert scale.update(0.0)
    assert (scale.value, scale.skipped_in_a_row) == (2.0, 0)


def test_the_loss_scale_is_doubled_after_enough_steps_without_overflow():
    scale, values = LossScale(initial=8.0, growth_interval=3), []
    for norm in (1.0, 1.0, 1.0, 1.0, 1.0, math.inf, 1.0, 1.0, 1.0, 1.0):
        scale.update(norm)
        values.append(scale.value)
    assert values == [8, 8, 16, 16, 16, 8, 8, 8, 16, 16]


def test_a_loss_scale_goes_on_from_its_state():
    first, second = LossScale(initial=8.0, growth_interval=3), LossScale(growth_interval=3)
    for norm in (1.0, math.inf, 1.0, 1.0):
        first.update(norm)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for norm in (1.0, math.inf):
        assert first.update(norm) == second.update(norm)
        assert first.state_dict() == second.state_dict()
    assert first.state_dict() == {"scale": 4.0, "steps_since_change": 0, "skipped_in_a_row": 1}
