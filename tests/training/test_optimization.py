import json
import math

import pytest
import torch
from torch import nn

from mixlm.errors import UserError
from mixlm.training.optimization import (
    MUON_MOMENTUM,
    NEWTON_SCHULZ,
    NEWTON_SCHULZ_ROUNDS,
    Muon,
    OptimizerSettings,
    learning_rate_factor,
    matrices_of,
    orthogonalized,
)
from mixlm.training.precision import LossScale


def groups_by_name(model) -> dict[str, float]:
    """Parameter name -> weight decay; every parameter has to be in exactly one group."""
    optimizer = OptimizerSettings(learning_rate=0.1, weight_decay=0.3, epsilon=1e-7).build(model)
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
    optimizer = OptimizerSettings(learning_rate=0.1, weight_decay=0.3, epsilon=1e-7).build(make_model())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {(group["lr"], group["eps"], group["betas"]) for group in optimizer.param_groups} == {
        (0.1, 1e-7, (0.9, 0.999))
    }


@pytest.mark.parametrize("family", ["mixlm", "switch"])
def test_muon_has_the_weights_of_the_layers_and_adamw_the_rest(make_model, family):
    model = make_model(family)
    shapes = {name: matrices_of(model).get(parameter) for name, parameter in model.named_parameters()}
    with_muon = {name for name, shape in shapes.items() if shape is not None}
    assert with_muon == {
        name
        for name, parameter in model.named_parameters()
        if name.startswith("encoder.stack") and name.endswith("weight") and "norm" not in name.lower()
    }
    if family == "mixlm":  # kernel_size 5 and 3, for 2 kernel groups in each of 2 slices
        hidden, width = model.config.hidden_size, model.config.ff_dim
        assert shapes["encoder.stack.attentions.0.o_proj.weight"] == (1, hidden, hidden)
        first, second = (f"encoder.stack.feed_forwards.0.convolution.convolutions.{n}.weight" for n in (0, 1))
        assert shapes[first] == (2, width // 4, hidden // 4 * 5)
        assert shapes[second] == (2, width // 4, hidden // 4 * 3)
    else:
        assert {shapes[name] for name in shapes if name.endswith("experts.up_weight")} == {
            (model.config.n_experts, model.config.ff_dim, model.config.hidden_size)
        }
    groups = OptimizerSettings(0.1, 0.3, 1e-7, muon=True).groups(model)
    assert sorted(map(id, model.parameters())) == sorted(id(each) for group in groups for each in group["params"])
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0] + [0.3] * (len(groups) - 2)


def test_muon_has_both_towers_of_a_retriever(make_model):
    model = make_model("mixlm", "retrieval", two_towers=True)
    names = {name for name, parameter in model.named_parameters() if parameter in matrices_of(model)}
    towers = ("encoder.", "context_encoder.")
    first, second = ({name.removeprefix(tower) for name in names if name.startswith(tower)} for tower in towers)
    assert first == second and len(first) + len(second) == len(names) > 0


@pytest.mark.parametrize("shape", [(16, 16), (3, 16, 40), (40, 16)])
def test_orthogonalized_is_the_iteration_as_it_was_published(shape):
    """a X + b (X Xᵀ) X + c (X Xᵀ)² X, five times, in float64; and its singular values are near 1."""
    a, b, c = NEWTON_SCHULZ
    matrices = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = matrices / torch.linalg.matrix_norm(matrices, keepdim=True)
    for _ in range(NEWTON_SCHULZ_ROUNDS):
        gram = expected @ expected.mT
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    torch.testing.assert_close(orthogonalized(matrices), expected, rtol=1e-5, atol=1e-5)
    values = torch.linalg.svdvals(orthogonalized(matrices))
    assert values.max() < 1.3 and values[..., :-3].min() > 0.6
    # What tiny singular values of a float32 matrix become is small, and a number.
    low_rank = (matrices[..., :1] * matrices[..., :1, :]).float()
    assert torch.linalg.svdvals(orthogonalized(low_rank))[..., 1:].max() < 0.1
    assert orthogonalized(torch.zeros(4, 6)).abs().max() == 0


def test_muon_of_a_bfloat16_matrix_is_orthogonal_too():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    low_rank = torch.randn(64, 2, generator=generator) @ torch.randn(2, 64, generator=generator)
    noisy = low_rank + 1e-3 * torch.randn(64, 64, generator=generator)
    optimizer = Muon([{"params": [layer.weight], "matrices": (1, 64, 64)}], lr=1.0)
    values = torch.linalg.svdvals(optimizer._orthogonalized(noisy.bfloat16(), (1, 64, 64)).float())
    assert values.max() < 1.3


def test_muon_makes_the_steps_of_torch(make_model):
    """torch.optim.Muon knows matrices only, and orthogonalizes in bfloat16. The other parameters go AdamW's way."""
    ours, torchs = make_model("mixlm"), make_model("mixlm")
    optimizer = OptimizerSettings(0.02, 0.3, 1e-7, muon=True).build(ours)
    plain = {id(p) for p, shape in matrices_of(torchs).items() if shape[0] == 1}
    others = [group["params"] for group in OptimizerSettings(0.02, 0.3, 1e-7).groups(torchs)]
    with_muon = [p for p in torchs.parameters() if id(p) in plain]
    muon = torch.optim.Muon(with_muon, 0.02, 0.3, MUON_MOMENTUM, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": [p for p in others[0] if id(p) not in plain]}, {"params": others[1], "weight_decay": 0.0}],
        lr=0.02,
        weight_decay=0.3,
        eps=1e-7,
    )
    start = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for mine, its in zip(ours.parameters(), torchs.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            its.grad = mine.grad.clone()
        for each in (optimizer, muon, adamw):
            each.step()
    convolutions = {
        name for name, _ in ours.named_parameters() if ".convolutions." in name and name.endswith("weight")
    }
    for (name, mine), its in zip(ours.named_parameters(), torchs.parameters(), strict=True):
        if name not in convolutions:
            tolerance = 0.05 * (its - start[name]).abs().max().item() if id(its) in plain else 1e-6
            torch.testing.assert_close(
                mine, its, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_muon_moves_each_matrix_of_a_convolution_by_an_orthogonal_step(make_model):
    """Of those with more rows than columns, too."""
    model = make_model("mixlm", ff_dim=256)
    assert {rows > columns for _, rows, columns in matrices_of(model).values()} == {False, True}
    optimizer = OptimizerSettings(0.1, 0.0, 1e-7, muon=True).build(model)
    before = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    for parameter, (count, rows, columns) in matrices_of(model).items():
        change = (parameter - before[parameter]).detach().reshape(count, rows, columns)
        values = torch.linalg.svdvals(change / (0.1 * 0.2 * max(rows, columns) ** 0.5))
        assert 0.4 < values.min() and values.max() < 1.3


def test_a_matrix_without_a_gradient_stays(make_model):
    model = make_model("switch")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = OptimizerSettings(0.1, 0.3, 1e-7, muon=True).build(model)
    optimizer.step()
    assert not optimizer.state
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize(("zero", "auto_wrap"), [(3, False), (2, True), (3, True)])
def test_muon_is_refused_where_there_are_no_whole_matrices(make_arguments, zero, auto_wrap):
    settings = {"muon": True, "zero": zero, "auto_wrap": auto_wrap}
    with pytest.raises(UserError, match=r"--muon=True: must be left out where fairscale shares out parameters"):
        make_arguments(sharding_backend="fairscale", **settings)
    assert make_arguments(sharding_backend="torch", **settings).muon


@pytest.mark.parametrize("first", [False, True])
def test_moments_of_one_optimizer_are_not_taken_for_those_of_another(make_arguments, run_training, first):
    run_training(make_arguments(num_steps=2, muon=first))
    with pytest.raises(UserError, match=f"was trained {'with' if first else 'without'} --muon"):
        run_training(make_arguments(num_steps=3, muon=not first, resume="auto"))


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
