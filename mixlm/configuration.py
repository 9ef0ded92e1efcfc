"""Configurations of the two encoder families, and the presets that are loadable by name."""

import difflib
import json
import math
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

ACTIVATIONS = ("gelu", "relu", "swish")
PRESET_FOLDER = Path(__file__).parent / "configs"
LARGEST_NAMED = 1024  # of the numbers that an error lists

# What the older implementation had instead of fields. Its JSON files have no `model_type`.
LEGACY_SETTINGS = {"shared_parameters": "ffn", "final_layer_norm": False}
# Fields of older files that say nothing: an encoder is never causal, embeddings are as wide as the model.
LEGACY_FIELDS = ("embedding_size", "causal")
# What transformers writes into a configuration file beside the configuration's own fields.
SAVED_BESIDE = ("architectures", "auto_map", "transformers_version", "dtype", "torch_dtype", "num_labels")
# Fields that tell the family of a file without `model_type`.
FAMILY_FIELDS = ("kernel_size", "capacity_factor")


@strict
class _EncoderConfig(PreTrainedConfig):
    """The fields both families have. See `MixLMConfig` for their meaning."""

    attribute_map = {
        "hidden_act": "act_fn",
        "hidden_activation": "act_fn",
        "intermediate_size": "ff_dim",
        "num_attention_heads": "num_heads",
        "layer_norm_eps": "LN_eps",
        "hidden_dropout_prob": "dropout_prob",
        "attention_probs_dropout_prob": "dropout_prob",
        "max_position_embedding": "max_position_embeddings",
    }
    # What transformers' Trainer does not gather in an evaluation: parts of the loss, and what has other rows than the
    # labels.
    keys_to_ignore_at_inference = [
        *("mlm_loss", "sop_loss", "ict_loss", "aux_loss", "prediction_logits"),
        *("hidden_states", "attentions", "router_logits"),
    ]

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_heads: int = 4
    n_experts: int = 4
    ff_dim: int = 4096
    act_fn: str = "gelu"
    dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_group: int = 1
    shared_parameters: Literal["all", "ffn", "attention"] = "all"
    ln_pos: int = 0
    LN_eps: float | int = 1e-12
    final_layer_norm: bool | None = None
    residual_attention: bool = True
    initializer_range: float | int = 0.02
    pretraining_objective: Literal["sop", "ict"] = "sop"
    pooler: Literal["decoder", "mean", "cls"] = "decoder"
    normalize_embeddings: bool = False
    two_towers: bool = False
    kernels: Literal["auto", "plain", "fused", "lean"] = "auto"
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if self.final_layer_norm is None:
            self.final_layer_norm = self.ln_pos == 0
        super().__post_init__(**kwargs)

    def validate_fields(self):
        """Raise ValueError for a value that no field of its type may have.

        A family extends this one validator rather than adding its own: transformers runs validators in alphabetical
        order, and widths are divided by sizes that must not be 0.
        """
        for field in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "n_experts", "ff_dim",
            "max_position_embeddings", "type_vocab_size", "layer_group",
        ):  # fmt: skip
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")
        if self.act_fn not in ACTIVATIONS:
            raise ValueError(f"act_fn={self.act_fn!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
        if self.ln_pos not in (0, 1):
            raise ValueError(f"ln_pos={self.ln_pos} must be 0 (pre-LN) or 1 (post-LN)")
        if not 0 <= self.dropout_prob < 1:
            raise ValueError(f"dropout_prob={self.dropout_prob} must be at least 0 and below 1")
        self._check_number("LN_eps", above_zero=True, example="the usual value is 1e-12")
        self._check_number("initializer_range", above_zero=False, example="the usual value is 0.02")
        if self.num_hidden_layers % self.layer_group:
            raise ValueError(
                f"layer_group={self.layer_group} does not divide num_hidden_layers={self.num_hidden_layers}; "
                f"use one of {', '.join(map(str, _divisors(self.num_hidden_layers)))}"
            )

    def _check_number(self, field: str, above_zero: bool, example: str) -> None:
        value = getattr(self, field)
        if not (math.isfinite(value) and (value > 0 if above_zero else value >= 0)):
            raise ValueError(f"{field}={value} must be {'above' if above_zero else 'at least'} 0; {example}")

    @classmethod
    def from_preset(cls, name_or_file: str | Path, **overrides: Any) -> "_EncoderConfig":
        """A configuration from a preset's name or from a JSON file.

        Args:
            name_or_file: a name from `preset_names()`, e.g. `"mixlm-base"`, or the path of a JSON file. A file without
                `model_type` is read as the older implementation's: its layers shared the feed-forward only, pre-LN
                had no final LayerNorm, and its router used straight-through scaling.
            overrides: fields to set on top.

        Raises:
            ValueError: the name is unknown, the file is not a JSON object, it belongs to the other family, or a value
                is not allowed. The message begins with the name or file.
        """
        fields = cls._by_own_names(_read_fields(name_or_file, cls.model_type))
        model_type = fields.pop("model_type", None)
        if model_type is None:
            fields = cls._read_legacy_fields(name_or_file, fields)
        elif model_type != cls.model_type:
            raise ValueError(
                f"{name_or_file}: model_type={model_type!r}, but {cls.__name__} reads {cls.model_type!r}; "
                "run_pretraining.py takes the other family with --family"
            )
        else:
            cls._refuse_unknown(name_or_file, fields)
        overrides = cls._by_own_names(overrides)
        cls._refuse_unknown(name_or_file, overrides)
        try:
            return cls(**{**fields, **overrides})
        except StrictDataclassError as error:
            reason = error.__cause__ or error  # without the name of the validator
            raise ValueError(f"{name_or_file}: {' '.join(str(reason).split())}") from error
        except (AttributeError, TypeError) as error:  # of a field that transformers itself reads
            raise ValueError(f"{name_or_file}: {type(error).__name__}: {error}") from error

    @classmethod
    def _refuse_unknown(cls, name_or_file: str | Path, fields: dict[str, Any]) -> None:
        """Raise ValueError for a misspelled field: its default would be taken without a word."""
        known = {*cls().to_dict(), *SAVED_BESIDE}
        for field in fields:
            if field not in known:
                close = difflib.get_close_matches(field, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"{name_or_file}: unknown field {field!r}{hint}")

    @classmethod
    def _by_own_names(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """`fields` without aliases: otherwise a file's `max_position_embedding` would beat an override."""
        return {cls.attribute_map.get(name, name): value for name, value in fields.items()}

    @classmethod
    def _read_legacy_fields(cls, name_or_file: str | Path, fields: dict[str, Any]) -> dict[str, Any]:
        foreign = [name for name in FAMILY_FIELDS if name in fields and not hasattr(cls, name)]
        if foreign:
            raise ValueError(
                f"{name_or_file}: has {foreign[0]}, a field of the other family, and no model_type; "
                f"{cls.__name__} reads model_type={cls.model_type!r}"
            )
        hidden_size = fields.get("hidden_size", cls.hidden_size)
        if fields.get("embedding_size", hidden_size) != hidden_size:
            raise ValueError(
                f"{name_or_file}: embedding_size={fields['embedding_size']} differs from hidden_size={hidden_size}; "
                "factorised embeddings are not supported"
            )
        return {**cls.legacy_settings(), **{k: v for k, v in fields.items() if k not in LEGACY_FIELDS}}

    @classmethod
    def legacy_settings(cls) -> dict[str, Any]:
        """What the older implementation did where this one has a field."""
        return dict(LEGACY_SETTINGS)


@strict
class MixLMConfig(_EncoderConfig):
    """Configuration of the MixLM encoder. Every field has its transformers alias through `attribute_map`.

    Args:
        vocab_size: tokens in the vocabulary.
        hidden_size: width C of the hidden state.
        num_hidden_layers: layers that are run, whether or not they share parameters.
        n_experts: slices E the hidden state is cut into; each slice is one attention map of width C / E.
        num_heads: kernel groups G inside one slice.
        kernel_size: the largest convolution kernel, odd. See `modeling_mixlm.kernel_sizes`.
        ff_dim: feed-forward width.
        act_fn: "gelu", "relu" or "swish".
        dropout_prob: dropout probability everywhere.
        max_position_embeddings: the longest sequence, in tokens.
        type_vocab_size: token types (segments).
        layer_group: this many consecutive layers share parameters: 1 = BERT, num_hidden_layers = ALBERT.
        shared_parameters: what a layer group shares: "all" (the whole layer), "ffn" or "attention" (that module; the
            LayerNorms stay each layer's own).
        ln_pos: 0 = pre-LN, 1 = post-LN.
        LN_eps: epsilon of every LayerNorm, inside the root.
        final_layer_norm: one LayerNorm after the stack; default: on for pre-LN.
        residual_attention: carry raw attention scores to the next layer (RealFormer, arXiv:2012.11747). Off =
            ordinary attention through transformers' attention interface (eager, sdpa).
        initializer_range: standard deviation of initial weights.
        pretraining_objective: what ForPreTraining learns beside MLM: "sop" (ALBERT) or "ict" (ORQA).
        pooler: how a text becomes one vector: "decoder" (a learned weight per position), "mean" or "cls".
        normalize_embeddings: retrieval: a vector is divided by its norm, so that inner products are cosines.
        two_towers: retrieval: contexts have an encoder of their own instead of that of the queries.
        kernels: how the formulas are computed. It changes time and memory, and no result in float32 and float64; in 16
            bits, results and gradients differ in rounding. "plain" = torch's operations one by one; "fused" = the
            functions of `mixlm.kernels`; "lean" = those, computing the activations of the feed-forward twice rather
            than keeping them; "auto" = by device, hidden size and length (`kernels.choose_kernels`). Only "plain" can
            run backward twice through the same forward pass (retain_graph, second derivatives); the others say so in
            an error.

    Raises:
        StrictDataclassError: a field has the wrong type, or a value that is not allowed (the message names both).
    """

    model_type = "mixlm"

    kernel_size: int = 9

    def validate_fields(self):
        """Also raise ValueError for kernels that are not centred, and widths that slices and groups do not divide."""
        super().validate_fields()
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            near = (self.kernel_size - 1, self.kernel_size + 1)
            raise ValueError(
                f"kernel_size={self.kernel_size} must be odd and positive, so that a kernel is centred; "
                f"use {_one_of(near)}"
            )
        longest = 2 * self.max_position_embeddings - 1  # from the first token to the last, both ways
        if self.kernel_size > longest:
            raise ValueError(
                f"kernel_size={self.kernel_size} reaches beyond max_position_embeddings="
                f"{self.max_position_embeddings}; use at most {longest}"
            )
        parts = self.n_experts * self.num_heads
        for field in ("hidden_size", "ff_dim"):
            width = getattr(self, field)
            if width % parts:
                near = (width // parts * parts, (width // parts + 1) * parts)
                raise ValueError(
                    f"{field}={width} is not divisible by n_experts x num_heads = {self.n_experts} x "
                    f"{self.num_heads}; use {field}={_one_of(near)}"
                )


@strict
class MixLMSwitchConfig(_EncoderConfig):
    """Configuration of the Switch encoder: ordinary attention and a top-1 mixture-of-experts feed-forward.

    The fields of `MixLMConfig` without kernel_size, where num_heads counts attention heads, n_experts counts experts
    and ff_dim is the width of one expert; and:

    Args:
        capacity_factor: while training an expert takes at most ceil(capacity_factor x tokens / n_experts) tokens of a
            sequence; what is over passes through the residual alone (Switch Transformer, arXiv:2101.03961, 2.2).
        router_scaling: what an expert's output is multiplied by: "probability" p, as in the paper, or
            "straight-through" p / stop_gradient(p), as in the older weights.
        router_aux_loss_coef: weight of the load-balancing loss (Switch Transformer, eq. 4).
        router_z_loss_coef: weight of the router z-loss (ST-MoE, arXiv:2202.08906, eq. 5).
        output_router_logits: return each layer's router logits.
    """

    model_type = "mixlm_switch"

    num_heads: int = 8
    ff_dim: int = 2048
    capacity_factor: float | int = 1.2
    router_scaling: Literal["probability", "straight-through"] = "probability"
    router_aux_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.001
    output_router_logits: bool = False

    def validate_fields(self):
        """Also raise ValueError for a width that cannot be cut into heads, and for wrong numbers of the router."""
        super().validate_fields()
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}; "
                f"use num_heads = one of {', '.join(map(str, _divisors(self.hidden_size)))}"
            )
        self._check_number("capacity_factor", above_zero=True, example="the published value is 1.2")
        self._check_number("router_aux_loss_coef", above_zero=False, example="the usual value is 0.01")
        self._check_number("router_z_loss_coef", above_zero=False, example="the usual value is 0.001")

    @classmethod
    def legacy_settings(cls) -> dict[str, Any]:
        """What the older implementation did where this one has a field."""
        return {**LEGACY_SETTINGS, "router_scaling": "straight-through"}


def preset_names(model_type: str | None = None) -> list[str]:
    """Names of the presets, of one family or of both, sorted."""
    presets = {path.stem: json.loads(path.read_text("utf-8")) for path in PRESET_FOLDER.glob("*.json")}
    return sorted(name for name, fields in presets.items() if model_type in (None, fields["model_type"]))


def read_config(name_or_file: str | Path, **overrides: Any) -> MixLMConfig | MixLMSwitchConfig:
    """A configuration as `from_preset` reads it, of whichever family it is; arguments and errors are the same."""
    fields = _read_fields(name_or_file, None)
    is_switch = "capacity_factor" in fields or fields.get("model_type") == MixLMSwitchConfig.model_type
    return (MixLMSwitchConfig if is_switch else MixLMConfig).from_preset(name_or_file, **overrides)


def _read_fields(name_or_file: str | Path, model_type: str | None) -> dict[str, Any]:
    preset = PRESET_FOLDER / f"{name_or_file}.json"
    path = preset if preset.is_file() else Path(name_or_file)
    if not path.is_file():
        raise ValueError(
            f"{name_or_file}: neither a file nor a preset; presets: {', '.join(preset_names(model_type))}"
        )
    try:
        fields = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, lists in lists in lists
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: holds a JSON {type(fields).__name__}, expected an object of configuration fields")
    return fields


def _one_of(values: tuple[int, ...]) -> str:
    return " or ".join(str(value) for value in values if value > 0) or "1"


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, min(number, LARGEST_NAMED) + 1) if number % candidate == 0]


__all__ = ["MixLMConfig", "MixLMSwitchConfig", "preset_names"]
