"""Checkpoints of the older implementation -> one folder that every head's `from_pretrained` loads."""

import re
from pathlib import Path

import torch
from torch import Tensor

from .configuration import MixLMConfig, MixLMSwitchConfig
from .errors import UserError
from .modeling_mixlm import MixLMForPreTraining, kernel_sizes
from .modeling_switch import MixLMSwitchForPreTraining

FAMILIES = {
    "mixlm": (MixLMConfig, MixLMForPreTraining),
    "switch": (MixLMSwitchConfig, MixLMSwitchForPreTraining),
}

# Older key -> key here, for everything that is only renamed. None: not needed here.
RENAMED = (
    (r"^bert\.embeddings\.LayerNorm\.", "encoder.embeddings.norm."),
    (r"^bert\.embeddings\.", "encoder.embeddings."),
    (r"^bert\.encoder\.layer\.(\d+)\.attention_norm\.", r"encoder.stack.layers.\1.attention_norm."),
    (r"^bert\.encoder\.layer\.(\d+)\.ffn_norm\.", r"encoder.stack.layers.\1.feed_forward_norm."),
    (r"^bert\.encoder\.layer\.(\d+)\.attn\.((?:query|key|value|o_proj)\.\w+)$", r"encoder.stack.attentions.\1.\2"),
    (r"^cls\.decoder\.weight$", None),  # tied to the word embeddings
    (r"^cls\.LayerNorm\.", "mlm_head.norm."),
    (r"^cls\.", "mlm_head."),
    (r"^qa_outputs\.", "qa_outputs."),
)
CONVOLUTION = re.compile(
    r"^bert\.encoder\.layer\.(\d+)\.(attn\.key|ffn\.fc1)\.(\d+)\.(w_mask|conv\.weight|conv\.bias)$"
)
EXPERT = re.compile(r"^bert\.encoder\.layer\.(\d+)\.ffn\.experts\.(\d+)\.(fc1|fc2)\.(weight|bias)$")
FEED_FORWARD = re.compile(r"^bert\.encoder\.layer\.(\d+)\.ffn\.(fc2|switch)\.(weight|bias)$")


def convert_checkpoint(
    checkpoint: str | Path, config_file: str | Path, out: str | Path, family: str, head: str
) -> None:
    """Write an older state dict as a folder of this package.

    The folder's main model is ForPreTraining; it also holds the weights of question answering (`qa_outputs`, which the
    older implementation used as sentence-order classifier too) and, from an ict checkpoint, of the retrieval pooler.

    Args:
        checkpoint: a `.bin` file written by `torch.save`; read with `weights_only=True`, so no code in it runs.
        config_file: its JSON configuration.
        out: the folder to write.
        family: "mixlm" or "switch".
        head: "sop" (the checkpoint's `decoder` is the dense layer for sentence order) or "ict" (one weight a position).

    Raises:
        UserError: a file cannot be read, or it is not such a checkpoint (the message names the keys).
    """
    config_class, model_class = FAMILIES[family]
    try:
        config = config_class.from_preset(config_file, pretraining_objective=head)
    except Exception as error:  # transformers wraps wrong values in several classes of error
        raise UserError(f"{config_file}: {error}") from error
    weights = convert_weights(read_weights(checkpoint), config, head)

    model = model_class(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if name != "mlm_head.decoder.weight"]
    unexpected = [name for name in unexpected if not name.startswith("qa_outputs.")]
    if missing or unexpected:
        raise UserError(
            f"{checkpoint}: does not fit {config_file} with --family {family} --head {head}: "
            f"missing {missing[:3]}, not expected {unexpected[:3]}"
        )
    qa_outputs = {name: tensor for name, tensor in weights.items() if name.startswith("qa_outputs.")}
    model.to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights, strict=False)
    model.save_pretrained(out, state_dict={**model.state_dict(), **qa_outputs})


def read_weights(checkpoint: str | Path) -> dict[str, Tensor]:
    """The tensors of an older `.bin` file, by their older names."""
    try:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{checkpoint}: no such file") from error
    except Exception as error:  # torch raises unpickling, zip and runtime errors for a file of another kind
        raise UserError(f"{checkpoint}: not a file of plain tensors written by torch.save: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{checkpoint}: holds a {type(weights).__name__}, expected a dictionary of name -> tensor")
    return weights


def convert_weights(older: dict[str, Tensor], config: MixLMConfig | MixLMSwitchConfig, head: str) -> dict[str, Tensor]:
    """Older names and layouts -> those of this package (see `convert_checkpoint`).

    Raises:
        UserError: a key is not known, or a convolution has other kernels than the configuration says.
    """
    weights: dict[str, Tensor] = {}
    slices: dict[str, dict[int, dict[str, Tensor]]] = {}  # convolution -> slice -> its tensors
    experts: dict[str, dict[int, Tensor]] = {}  # stacked parameter -> expert -> its tensor
    for key, tensor in older.items():
        if match := CONVOLUTION.match(key):
            layer, where, number, part = match.groups()
            name = (
                f"encoder.stack.attentions.{layer}.key"
                if where == "attn.key"
                else f"encoder.stack.feed_forwards.{int(layer) // config.layer_group}.convolution"
            )
            slices.setdefault(name, {}).setdefault(int(number), {})[part] = tensor
        elif match := EXPERT.match(key):
            layer, number, dense, kind = match.groups()
            direction = "up" if dense == "fc1" else "down"
            name = f"encoder.stack.feed_forwards.{int(layer) // config.layer_group}.experts.{direction}_{kind}"
            experts.setdefault(name, {})[int(number)] = tensor
        elif match := FEED_FORWARD.match(key):
            layer, dense, kind = match.groups()
            module = "router" if dense == "switch" else "dense"
            weights[f"encoder.stack.feed_forwards.{int(layer) // config.layer_group}.{module}.{kind}"] = tensor
        elif key == "decoder.linear.weight" and head == "ict":
            weights["pooler.weight"] = tensor[0]
        elif key in ("decoder.weight", "decoder.bias") and head == "sop":
            weights[key.replace("decoder", "sop_head.dense")] = tensor
        else:
            renamed = [(pattern, new) for pattern, new in RENAMED if re.search(pattern, key)]
            if not renamed:
                raise UserError(f"the checkpoint's key {key!r} does not belong to head {head!r} of this architecture")
            pattern, new = renamed[0]
            if new is not None:
                weights[re.sub(pattern, new, key)] = tensor

    for name, by_slice in slices.items():
        weights.update(_convolution_by_group(name, [by_slice[number] for number in sorted(by_slice)], config))
    for name, by_expert in experts.items():
        weights[name] = torch.stack([by_expert[number] for number in sorted(by_expert)])
    if head == "sop":
        for kind in ("weight", "bias"):
            if f"qa_outputs.{kind}" in weights:
                weights[f"sop_head.classifier.{kind}"] = weights[f"qa_outputs.{kind}"].clone()
    return weights


def _convolution_by_group(name: str, slices: list[dict[str, Tensor]], config: MixLMConfig) -> dict[str, Tensor]:
    """One padded and masked convolution per slice -> one convolution per kernel group, without the zero taps."""
    sizes = kernel_sizes(config.kernel_size, config.num_heads)
    converted = {}
    for group, size in enumerate(sizes):
        weights, biases = [], []
        for tensors in slices:
            channels = len(tensors["conv.bias"]) // len(sizes)
            rows = slice(group * channels, (group + 1) * channels)
            taps = tensors["w_mask"][rows].sum(dim=-1)
            if not (taps == size).all():
                raise UserError(
                    f"{name}: kernel group {group} has {int(taps.flatten()[0])} taps in the checkpoint, but "
                    f"kernel_size={config.kernel_size} with num_heads={config.num_heads} gives {size}"
                )
            rim = (config.kernel_size - size) // 2
            weights.append(tensors["conv.weight"][rows, :, rim : rim + size])
            biases.append(tensors["conv.bias"][rows])
        converted[f"{name}.convolutions.{group}.weight"] = torch.cat(weights)
        converted[f"{name}.convolutions.{group}.bias"] = torch.cat(biases)
    return converted
