"""Which modules are gathered as one."""

import pytest
import torch
import transformers
from torch import nn

from mixlm.training.sharding import describe, sharding_units
from mixlm.training.sharding.units import ROOT, Unit


def parameter_names(model, unit):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return sorted(names[parameter] for parameter in unit.parameters)


@pytest.mark.parametrize("family", ["mixlm", "switch"])
@pytest.mark.parametrize("task", ["SOP", "ICT"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_hidden_layers": 6, "layer_group": 3, "shared_parameters": "all"},
        {"num_hidden_layers": 6, "layer_group": 3, "shared_parameters": "ffn"},
        {"num_hidden_layers": 6, "layer_group": 3, "shared_parameters": "attention"},
    ],
)
def test_every_parameter_is_in_exactly_one_unit_and_none_is_used_outside_of_it(make_model, family, task, fields):
    model = make_model(family, task, **fields)
    units = sharding_units(model)
    placed = [parameter for unit in units for parameter in unit.parameters]
    assert len(placed) == len(set(placed)) and set(placed) == set(model.parameters())
    assert units[-1].name == ROOT and units[-1].module is model
    for unit in units[:-1]:
        inside = set(unit.module.modules())
        for module in set(model.modules()) - inside:
            assert not set(module.parameters(recurse=False)) & set(unit.parameters), unit.name


def test_a_module_that_serves_several_layers_is_one_unit(make_model):
    fields = {"num_hidden_layers": 6, "layer_group": 3}
    names = {
        shared: [unit.name for unit in sharding_units(make_model(shared_parameters=shared, **fields))[:-1]]
        for shared in ("all", "ffn", "attention")
    }
    attentions = [f"encoder.stack.attentions.{number}" for number in range(6)]
    feed_forwards = [f"encoder.stack.feed_forwards.{number}" for number in range(6)]
    assert names == {
        "all": attentions[:2] + feed_forwards[:2],
        "ffn": attentions + feed_forwards[:2],
        "attention": attentions[:2] + feed_forwards,
    }


def test_the_root_has_the_tied_embeddings_and_the_layer_norms(make_model):
    model = make_model()
    root = parameter_names(model, sharding_units(model)[-1])
    assert "encoder.embeddings.word_embeddings.weight" in root
    assert "encoder.stack.layers.0.attention_norm.weight" in root


def test_models_of_other_people_are_cut_by_their_layers():
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=9
    )
    names = [unit.name for unit in sharding_units(transformers.BertForMaskedLM(config))]
    assert names == ["bert.encoder.layer.0", "bert.encoder.layer.1", ROOT]


class Strange(nn.Module):
    """A block that shares a parameter with the outside, one that is in two lists, one of vectors, a list in a list."""

    def __init__(self):
        super().__init__()
        self.outside = nn.Linear(3, 3)
        tied, twice = nn.Linear(3, 3), nn.Linear(3, 3)
        tied.weight = self.outside.weight
        nested = nn.Module()
        nested.inner = nn.ModuleList([nn.Linear(3, 3)])
        self.blocks = nn.ModuleList([tied, twice, nn.LayerNorm(3), nested])
        self.again = nn.ModuleList([twice])


def test_what_cannot_be_a_unit_stays_in_the_root():
    model = Strange()
    units = sharding_units(model)
    assert [unit.name for unit in units] == ["blocks.1", "blocks.3", ROOT]
    assert parameter_names(model, units[-1]) == [
        *("blocks.0.bias", "blocks.2.bias", "blocks.2.weight", "outside.bias", "outside.weight")
    ]


def test_the_table_adds_up(make_model):
    model = make_model()
    units = sharding_units(model)
    table = describe(units, ranks=2).splitlines()
    counts = [int(line.split()[-2].replace(",", "")) for line in table[1:]]
    assert len(table) == len(units) + 1
    assert sum(counts) == sum(parameter.numel() for parameter in model.parameters())


def test_the_table_knows_what_has_one_moment():
    """A unit of 2^19 numbers in four bytes is 2 MiB: weight, gradient and two moments, or one."""
    units = [Unit("large", nn.Module(), [nn.Parameter(torch.zeros(2**10, 2**9))])]

    def shown(*with_one_moment: nn.Parameter) -> float:
        return float(describe(units, 2, with_one_moment).split()[-1])

    assert (shown(), shown(*units[0].parameters)) == (4.0, 3.0)
