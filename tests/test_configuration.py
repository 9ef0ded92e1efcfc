"""Configurations: aliases, JSON, presets, older files, and errors that name field, value and what is allowed."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel

from mixlm import MixLMConfig, MixLMModel, MixLMSwitchConfig, MixLMSwitchModel, preset_names
from mixlm.configuration import PRESET_FOLDER

BOTH_FAMILIES = pytest.mark.parametrize("config_class", [MixLMConfig, MixLMSwitchConfig])
MODELS = {"mixlm": MixLMModel, "mixlm_switch": MixLMSwitchModel}
ALIASES = [
    ("hidden_act", "act_fn", "relu"),
    ("hidden_activation", "act_fn", "swish"),
    ("intermediate_size", "ff_dim", 64),
    ("num_attention_heads", "num_heads", 2),
    ("layer_norm_eps", "LN_eps", 1e-6),
    ("hidden_dropout_prob", "dropout_prob", 0.25),
    ("attention_probs_dropout_prob", "dropout_prob", 0.25),
    ("max_position_embedding", "max_position_embeddings", 99),
]


def write(folder, content):
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


@BOTH_FAMILIES
class TestFields:
    @pytest.mark.parametrize("alias, field, value", ALIASES)
    def test_alias(self, config_class, alias, field, value):
        config = config_class(**{alias: value})
        assert getattr(config, field) == getattr(config, alias) == value
        config = config_class()
        assert getattr(config, alias) == getattr(config, field) != value
        setattr(config, alias, value)
        assert getattr(config, field) == value
        setattr(config, field, getattr(config_class(), field))
        assert getattr(config, alias) != value
        assert alias not in json.loads(config_class(**{alias: value}).to_json_string()), "saved by its own name"

    def test_json_round_trip(self, config_class, tmp_path):
        config = config_class(
            hidden_size=96,
            num_hidden_layers=6,
            num_heads=4,
            n_experts=2,
            ff_dim=128,
            act_fn="swish",
            dropout_prob=0.0,
            layer_group=3,
            shared_parameters="attention",
            ln_pos=1,
            LN_eps=1e-7,
            final_layer_norm=True,
            residual_attention=False,
            pretraining_objective="ict",
            pooler="mean",
        )
        config.save_pretrained(tmp_path)
        for read in (config_class.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
            assert type(read) is config_class
            assert read.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
        assert config_class.from_preset(tmp_path / "config.json").to_dict() == config.to_dict()

    @pytest.mark.parametrize(
        "ln_pos, given, expected", [(0, None, True), (1, None, False), (0, False, False), (1, True, True)]
    )
    def test_final_layer_norm_follows_ln_pos(self, config_class, ln_pos, given, expected):
        config = config_class(ln_pos=ln_pos, final_layer_norm=given)
        assert config.final_layer_norm is expected
        assert json.loads(config.to_json_string())["final_layer_norm"] is expected

    def test_defaults_of_the_design(self, config_class):
        config = config_class()
        assert (config.shared_parameters, config.pooler, config.residual_attention) == ("all", "decoder", True)
        if config_class is MixLMSwitchConfig:
            assert config.router_scaling == "probability"


COMMON_BAD_VALUES = [
    ({"act_fn": "tanh"}, ("act_fn", "tanh", "gelu", "relu", "swish")),
    ({"hidden_act": "gelu_new"}, ("act_fn", "gelu_new", "gelu, relu, swish")),
    ({"num_hidden_layers": 12, "layer_group": 5}, ("layer_group", "5", "12", "1, 2, 3, 4, 6, 12")),
    ({"num_hidden_layers": 2, "layer_group": 4}, ("layer_group", "4", "1, 2")),
    ({"ln_pos": 2}, ("ln_pos", "2", "0 (pre-LN) or 1 (post-LN)")),
    ({"ln_pos": -1}, ("ln_pos", "-1", "0 (pre-LN) or 1 (post-LN)")),
    ({"ln_pos": "pre"}, ("ln_pos", "pre", "int")),
    ({"dropout_prob": 1.0}, ("dropout_prob", "1.0", "at least 0 and below 1")),
    ({"dropout_prob": -0.1}, ("dropout_prob", "-0.1", "at least 0 and below 1")),
    ({"dropout_prob": float("nan")}, ("dropout_prob", "nan", "at least 0 and below 1")),
    ({"dropout_prob": "0.1"}, ("dropout_prob", "'0.1'", "float")),
    ({"hidden_size": "512"}, ("hidden_size", "'512'", "int")),
    ({"hidden_size": 512.0}, ("hidden_size", "512.0", "int")),
    ({"hidden_size": True}, ("hidden_size", "True", "int")),
    ({"hidden_size": None}, ("hidden_size", "None", "int")),
    ({"residual_attention": 1}, ("residual_attention", "1", "bool")),
    ({"final_layer_norm": "yes"}, ("final_layer_norm", "yes", "bool")),
    ({"shared_parameters": "none"}, ("shared_parameters", "none", "all", "ffn", "attention")),
    ({"pooler": "max"}, ("pooler", "max", "decoder", "mean", "cls")),
    ({"pretraining_objective": "nsp"}, ("pretraining_objective", "nsp", "sop", "ict")),
    ({"LN_eps": 0.0}, ("LN_eps", "0.0", "above 0")),
    ({"LN_eps": -1e-12}, ("LN_eps", "-1e-12", "above 0")),
    ({"initializer_range": -0.02}, ("initializer_range", "-0.02", "at least 0")),
    *[
        ({field: value}, (field, str(value), "at least 1"))
        for field in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_heads",
            "n_experts",
            "ff_dim",
            "max_position_embeddings",
            "type_vocab_size",
            "layer_group",
        )
        for value in (0, -8)
    ],
]
MIXLM_BAD_VALUES = [
    ({"kernel_size": 4}, ("kernel_size", "4", "odd", "3 or 5")),
    ({"kernel_size": 0}, ("kernel_size", "0", "odd", "use 1")),
    ({"kernel_size": -3}, ("kernel_size", "-3", "odd", "use 1")),
    (
        {"kernel_size": 17, "max_position_embeddings": 8},
        ("kernel_size", "17", "max_position_embeddings=8", "at most 15"),
    ),
    ({"kernel_size": 9.0}, ("kernel_size", "9.0", "int")),
    ({"hidden_size": 100}, ("hidden_size", "100", "n_experts x num_heads = 4 x 4", "96 or 112")),
    ({"ff_dim": 10}, ("ff_dim", "10", "n_experts x num_heads = 4 x 4", "use ff_dim=16")),
    ({"n_experts": 3}, ("hidden_size", "512", "3 x 4", "504 or 516")),
    ({"num_heads": 3}, ("hidden_size", "512", "4 x 3", "504 or 516")),
]
SWITCH_BAD_VALUES = [
    ({"hidden_size": 30}, ("hidden_size", "30", "num_heads=8", "1, 2, 3, 5, 6, 10, 15, 30")),
    ({"num_heads": 7}, ("num_heads", "7", "512", "1, 2, 4, 8")),
    ({"capacity_factor": 0}, ("capacity_factor", "0", "above 0")),
    ({"capacity_factor": -1.2}, ("capacity_factor", "-1.2", "above 0")),
    ({"capacity_factor": float("nan")}, ("capacity_factor", "nan", "above 0")),
    ({"capacity_factor": float("inf")}, ("capacity_factor", "inf", "above 0")),
    ({"router_scaling": "none"}, ("router_scaling", "none", "probability", "straight-through")),
    ({"router_aux_loss_coef": -0.01}, ("router_aux_loss_coef", "-0.01", "at least 0")),
    ({"router_z_loss_coef": "0"}, ("router_z_loss_coef", "'0'", "float")),
]


def assert_refused(config_class, fields, parts):
    with pytest.raises(StrictDataclassError) as caught:
        config_class(**fields)
    for part in parts:
        assert part in str(caught.value)


class TestBadValues:
    """The message names the field, the value and what is allowed."""

    @pytest.mark.parametrize("fields, parts", COMMON_BAD_VALUES, ids=str)
    @BOTH_FAMILIES
    def test_of_both_families(self, config_class, fields, parts):
        assert_refused(config_class, fields, parts)

    @pytest.mark.parametrize("fields, parts", MIXLM_BAD_VALUES, ids=str)
    def test_of_mixlm(self, fields, parts):
        assert_refused(MixLMConfig, fields, parts)

    @pytest.mark.parametrize("fields, parts", SWITCH_BAD_VALUES, ids=str)
    def test_of_switch(self, fields, parts):
        assert_refused(MixLMSwitchConfig, fields, parts)

    def test_the_advice_is_good(self):
        """What a message says to use can be used."""
        MixLMConfig(kernel_size=3), MixLMConfig(kernel_size=5), MixLMConfig(kernel_size=1)
        MixLMConfig(hidden_size=96), MixLMConfig(hidden_size=112), MixLMConfig(ff_dim=16)
        MixLMSwitchConfig(hidden_size=30, num_heads=15)
        MixLMConfig(num_hidden_layers=12, layer_group=6)

    @BOTH_FAMILIES
    def test_wrong_type_set_later(self, config_class):
        config = config_class()
        with pytest.raises(StrictDataclassError, match="hidden_size"):
            config.hidden_size = "512"


class TestPresets:
    def test_names(self):
        names = preset_names()
        assert names == sorted(path.stem for path in PRESET_FOLDER.glob("*.json"))
        assert {"mixlm-base", "mixlm-switch-base"} <= set(names)
        assert set(preset_names("mixlm")).isdisjoint(preset_names("mixlm_switch"))
        assert sorted(preset_names("mixlm") + preset_names("mixlm_switch")) == names

    @pytest.mark.parametrize("name", preset_names())
    def test_loads_and_builds(self, name):
        config_class = MixLMConfig if name in preset_names("mixlm") else MixLMSwitchConfig
        config = config_class.from_preset(name)
        stored = json.loads((PRESET_FOLDER / f"{name}.json").read_text("utf-8"))
        assert {field: getattr(config, field) for field in stored} == stored, "no field is lost or misspelled"
        assert set(stored) - {"model_type"} <= set(config_class.__dataclass_fields__)
        import torch

        with torch.device("meta"):
            model = AutoModel.from_config(config)
        assert type(model) is MODELS[config.model_type]
        assert len(model.stack.feed_forwards) == config.num_hidden_layers // config.layer_group

    def test_base_shares_the_feed_forward_only(self):
        for config in (MixLMConfig.from_preset("mixlm-base"), MixLMSwitchConfig.from_preset("mixlm-switch-base")):
            assert (config.layer_group, config.shared_parameters) == (3, "ffn")

    def test_overrides(self):
        config = MixLMConfig.from_preset("mixlm-tiny", vocab_size=123, pooler="cls", num_attention_heads=2)
        assert (config.vocab_size, config.pooler, config.num_heads) == (123, "cls", 2)
        assert config.hidden_size == MixLMConfig.from_preset("mixlm-tiny").hidden_size

    def test_unknown_name(self):
        with pytest.raises(
            ValueError, match="mixlm-huge: neither a file nor a preset; presets: .*mixlm-base"
        ) as caught:
            MixLMConfig.from_preset("mixlm-huge")
        assert "switch" not in str(caught.value), "only presets of the family are of use"

    @pytest.mark.parametrize(
        "config_class, name", [(MixLMConfig, "mixlm-switch-tiny"), (MixLMSwitchConfig, "mixlm-tiny")]
    )
    def test_of_the_other_family(self, config_class, name):
        with pytest.raises(ValueError, match=f"{name}: model_type='mixlm.*{config_class.__name__} reads"):
            config_class.from_preset(name)


class TestFiles:
    @pytest.mark.parametrize("as_type", [str, lambda path: path])
    def test_by_path(self, tmp_path, as_type):
        path = write(tmp_path, {"model_type": "mixlm", "hidden_size": 64, "ff_dim": 32})
        config = MixLMConfig.from_preset(as_type(path), ff_dim=128)
        assert (config.hidden_size, config.ff_dim, config.shared_parameters) == (64, 128, "all")

    @pytest.mark.parametrize("content", ["", "{", "not json", '{"hidden_size": 64,}', "\x00"])
    def test_broken_json(self, tmp_path, content):
        path = write(tmp_path, content)
        with pytest.raises(ValueError, match=f"{path}: not a JSON file"):
            MixLMConfig.from_preset(path)

    def test_not_text(self, tmp_path):
        path = tmp_path / "model.bin"
        path.write_bytes(b"\x80\x04\xff\xfe")
        with pytest.raises(ValueError, match=f"{path}: not a JSON file"):
            MixLMConfig.from_preset(path)

    @pytest.mark.parametrize("content", ["[1, 2]", "3", '"mixlm"', "null", "true"])
    def test_json_of_another_kind(self, tmp_path, content):
        path = write(tmp_path, content)
        with pytest.raises(ValueError, match=f"{path}: holds a JSON .*expected an object"):
            MixLMConfig.from_preset(path)

    @pytest.mark.parametrize("model_type", ["bert", 3, ""])
    def test_other_model_type(self, tmp_path, model_type):
        path = write(tmp_path, {"model_type": model_type})
        with pytest.raises(ValueError, match=f"{path}: model_type={model_type!r}, but MixLMConfig reads 'mixlm'"):
            MixLMConfig.from_preset(path)

    def test_folder(self, tmp_path):
        with pytest.raises(ValueError, match="neither a file nor a preset"):
            MixLMConfig.from_preset(tmp_path)

    @pytest.mark.parametrize("fields", [{"kernel_size": 4}, {"hidden_size": "wide"}])
    def test_bad_value_names_the_file_in_one_line(self, tmp_path, fields):
        path = write(tmp_path, {"model_type": "mixlm", **fields})
        with pytest.raises(ValueError, match=f"^{path}: .*{next(iter(fields))}") as caught:
            MixLMConfig.from_preset(path)
        assert "\n" not in str(caught.value)


# What a file of the older implementation looks like: no model_type, fields that are gone.
OLDER = {"hidden_size": 64, "embedding_size": 64, "num_hidden_layers": 4, "num_heads": 4, "n_experts": 2, "ff_dim": 64}


class TestOlderFiles:
    def test_legacy_settings(self, tmp_path):
        path = write(tmp_path, {**OLDER, "causal": False, "max_position_embedding": 77, "layer_group": 2})
        config = MixLMConfig.from_preset(path)
        assert (config.shared_parameters, config.final_layer_norm) == ("ffn", False)
        assert (config.max_position_embeddings, config.layer_group, config.hidden_size) == (77, 2, 64)
        assert not hasattr(config, "embedding_size") and not hasattr(config, "causal")
        config = MixLMSwitchConfig.from_preset(path)
        assert (config.shared_parameters, config.final_layer_norm) == ("ffn", False)
        assert config.router_scaling == "straight-through"

    def test_its_own_fields_beat_the_legacy_settings(self, tmp_path):
        path = write(tmp_path, {**OLDER, "shared_parameters": "all"})
        config = MixLMConfig.from_preset(path, final_layer_norm=True)
        assert (config.shared_parameters, config.final_layer_norm) == ("all", True)

    @pytest.mark.parametrize("name", ["max_position_embedding", "max_position_embeddings"])
    @pytest.mark.parametrize("override", ["max_position_embedding", "max_position_embeddings"])
    def test_an_override_beats_the_file_by_either_name(self, tmp_path, name, override):
        path = write(tmp_path, {**OLDER, name: 77})
        assert MixLMConfig.from_preset(path, **{override: 33}).max_position_embeddings == 33

    def test_saved_again_it_means_the_same(self, tmp_path):
        config = MixLMConfig.from_preset(write(tmp_path, OLDER))
        config.save_pretrained(tmp_path)
        assert MixLMConfig.from_preset(tmp_path / "config.json").to_dict() == config.to_dict()

    @pytest.mark.parametrize("fields", [{"embedding_size": 32, "hidden_size": 64}, {"embedding_size": 32}])
    def test_factorised_embeddings(self, tmp_path, fields):
        path = write(tmp_path, fields)
        with pytest.raises(ValueError, match=f"{path}: embedding_size=32 differs from hidden_size="):
            MixLMConfig.from_preset(path)

    def test_embedding_size_alone(self, tmp_path):
        assert MixLMConfig.from_preset(write(tmp_path, {"embedding_size": 512})).hidden_size == 512

    @pytest.mark.parametrize(
        "config_class, field", [(MixLMConfig, "capacity_factor"), (MixLMSwitchConfig, "kernel_size")]
    )
    def test_of_the_other_family(self, tmp_path, config_class, field):
        path = write(tmp_path, {**OLDER, field: 9})
        with pytest.raises(ValueError, match=f"{path}: has {field}, a field of the other family"):
            config_class.from_preset(path)

    @pytest.mark.parametrize("family", ["mixlm", "switch"])
    def test_golden_files(self, golden, family):
        config_class = MixLMConfig if family == "mixlm" else MixLMSwitchConfig
        for norm in ("preln", "postln"):
            config = config_class.from_preset(golden / f"{family}_{norm}_config.json")
            assert (config.ln_pos, config.layer_group) == (0 if norm == "preln" else 1, 2)


def test_an_absurd_width_is_refused_at_once():
    with pytest.raises(StrictDataclassError, match="not divisible by num_heads=7; .* one of 1, 2, 4, 5, 8"):
        MixLMSwitchConfig(hidden_size=10**18, num_heads=7)
