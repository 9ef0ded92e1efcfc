"""Checkpoints of the older implementation -> one folder that every head's `from_pretrained` loads."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .configuration import MixLMConfig, MixLMSwitchConfig
from .errors import UserError
from .files import new_folder, require_free
from .modeling_mixlm import MixLMForPreTraining, kernel_sizes
from .modeling_switch import MixLMSwitchForPreTraining

FAMILIES = {
    "mixlm": (MixLMConfig, MixLMForPreTraining),
    "switch": (MixLMSwitchConfig, MixLMSwitchForPreTraining),
}
HEADS = ("sop", "ict")

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
        out: the folder to write, new or empty.
        family: "mixlm" or "switch".
        head: what the checkpoint's `decoder` is: "sop" (the dense layer for sentence order) or "ict" (a weight per
            position).

    Raises:
        UserError: a file cannot be read, it is not such a checkpoint (the message names the keys), or `out` cannot be
            written. Then `out` is as it was.
    """
    if family not in FAMILIES:
        raise UserError(f"family {family!r} is unknown; use one of {', '.join(FAMILIES)}")
    if head not in HEADS:
        raise UserError(f"head {head!r} is unknown; use one of {', '.join(HEADS)}")
    out = Path(out)
    require_free(out)
    config_class, model_class = FAMILIES[family]
    try:
        config = config_class.from_preset(config_file, pretraining_objective=head)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    older = read_weights(checkpoint)
    try:
        weights = convert_weights(older, config, head)
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from error

    model = model_class(config)
    wrong = _differences(weights, model)
    if wrong:
        raise UserError(f"{checkpoint}: does not fit {config_file} with family {family}, head {head}: {wrong}")
    model.to(weights["encoder.embeddings.word_embeddings.weight"].dtype)
    model.load_state_dict(weights, strict=False)
    qa_outputs = {name: tensor for name, tensor in weights.items() if name.startswith("qa_outputs.")}
    with new_folder(out) as folder:
        model.save_pretrained(folder, state_dict={**model.state_dict(), **qa_outputs})


def _differences(weights: dict[str, Tensor], model: torch.nn.Module) -> str:
    """What keeps `weights` from being the model's, in words; "" where nothing does."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    expected |= {"qa_outputs.weight": (2, model.config.hidden_size), "qa_outputs.bias": (2,)}
    optional = {"mlm_head.decoder.weight", "qa_outputs.weight", "qa_outputs.bias"}  # tied; not of this model
    differences = {
        "missing": [name for name in expected if name not in weights and name not in optional],
        "not expected": [name for name in weights if name not in expected],
        "of another shape": [
            f"{name} {list(tensor.shape)} instead of {list(expected[name])}"
            for name, tensor in weights.items()
            if name in expected and tensor.shape != expected[name]
        ],
        "not of floating point": [name for name, tensor in weights.items() if not tensor.is_floating_point()],
    }
    return "; ".join(
        f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in differences.items()
        if names
    )


def read_weights(checkpoint: str | Path) -> dict[str, Tensor]:
    """The tensors of an older `.bin` file, by their older names."""
    try:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{checkpoint}: no such file") from error
    except Exception as error:  # torch raises unpickling, zip and runtime errors for a file of another kind
        # Torch's own message would advise to run the file's code.
        raise UserError(
            f"{checkpoint}: not a file of plain tensors written by torch.save; a file that holds anything else, "
            "such as code, is not read"
        ) from error
    if not isinstance(weights, dict):
        raise UserError(f"{checkpoint}: holds a {type(weights).__name__}, expected a dictionary of name -> tensor")
    for name, value in weights.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise UserError(
                f"{checkpoint}: its entry {name!r} is a {type(value).__name__}, expected name -> tensor alone"
            )
    return weights


def convert_weights(older: dict[str, Tensor], config: MixLMConfig | MixLMSwitchConfig, head: str) -> dict[str, Tensor]:
    """Older names and layouts -> those of this package (see `convert_checkpoint`).

    Raises:
        UserError: a key is not known, or a convolution has other kernels than the configuration says.
    """
    weights: dict[str, Tensor] = {}
    slices: dict[str, dict[int, dict[str, Tensor]]] = {}  # convolution -> slice -> its tensors
    experts: dict[str, dict[int, Tensor]] = {}  # stacked parameter -> expert -> its tensor
    is_switch = isinstance(config, MixLMSwitchConfig)
    for key, tensor in older.items():
        if not is_switch and (match := CONVOLUTION.match(key)):
            layer, where, number, part = match.groups()
            name = (
                f"encoder.stack.attentions.{layer}.key"
                if where == "attn.key"
                else f"{_feed_forward(layer, config)}.convolution"
            )
            slices.setdefault(name, {}).setdefault(int(number), {})[part] = tensor
        elif is_switch and (match := EXPERT.match(key)):
            layer, number, dense, kind = match.groups()
            direction = "up" if dense == "fc1" else "down"
            name = f"{_feed_forward(layer, config)}.experts.{direction}_{kind}"
            experts.setdefault(name, {})[int(number)] = tensor
        elif match := FEED_FORWARD.match(key):
            layer, dense, kind = match.groups()
            module = "router" if dense == "switch" else "dense"
            weights[f"{_feed_forward(layer, config)}.{module}.{kind}"] = tensor
        elif key == "decoder.linear.weight" and head == "ict":
            weights["pooler.weight"] = tensor.flatten()
        elif key in ("decoder.weight", "decoder.bias") and head == "sop":
            weights[key.replace("decoder", "sop_head.dense")] = tensor
        else:
            renamed = [(pattern, new) for pattern, new in RENAMED if re.search(pattern, key)]
            if not renamed:
                raise UserError(f"its key {key!r} does not belong to head {head!r} of {config.model_type}")
            pattern, new = renamed[0]
            if new is not None:
                weights[re.sub(pattern, new, key)] = tensor

    for name, by_slice in slices.items():
        weights.update(_convolution_by_group(name, _in_order(name, by_slice, config), config))
    for name, by_expert in experts.items():
        of_experts = _in_order(name, by_expert, config)
        if any(tensor.shape != of_experts[0].shape for tensor in of_experts):
            raise UserError(f"{name}: its experts have different shapes")
        weights[name] = torch.stack(of_experts)
    if head == "sop":
        for kind in ("weight", "bias"):
            if f"qa_outputs.{kind}" in weights:
                weights[f"sop_head.classifier.{kind}"] = weights[f"qa_outputs.{kind}"].clone()
    return weights


def _feed_forward(layer: str, config: MixLMConfig | MixLMSwitchConfig) -> str:
    group, place = divmod(int(layer), config.layer_group)
    if place:
        raise UserError(
            f"layer {layer} has a feed-forward, but with layer_group={config.layer_group} only the first layer of a "
            "group has one; correct layer_group in the configuration"
        )
    return f"encoder.stack.feed_forwards.{group}"


def _in_order(name: str, by_number: dict[int, Any], config: MixLMConfig | MixLMSwitchConfig) -> list[Any]:
    if sorted(by_number) != list(range(config.n_experts)):
        raise UserError(
            f"{name}: the checkpoint has {len(by_number)} (numbers {sorted(by_number)}) of them, "
            f"but n_experts={config.n_experts}"
        )
    return [by_number[number] for number in range(config.n_experts)]


def _convolution_by_group(name: str, slices: list[dict[str, Tensor]], config: MixLMConfig) -> dict[str, Tensor]:
    """One padded and masked convolution per slice -> one convolution per kernel group, without the zero taps."""
    sizes = kernel_sizes(config.kernel_size, config.num_heads)
    for tensors in slices:
        absent = [part for part in ("w_mask", "conv.weight", "conv.bias") if part not in tensors]
        if absent:
            raise UserError(f"{name}: a slice lacks its {', '.join(absent)}")
        outputs, widest = tensors["conv.bias"].numel(), config.kernel_size
        weight, mask = list(tensors["conv.weight"].shape), list(tensors["w_mask"].shape)
        if weight[::2] != [outputs, widest] or mask != [outputs, 1, widest]:
            raise UserError(
                f"{name}: {outputs} outputs have weights {weight} and a mask {mask}, expected "
                f"[{outputs}, inputs, {widest}] and [{outputs}, 1, {widest}] with kernel_size={widest}"
            )
    converted = {}
    for group, size in enumerate(sizes):
        rim = (config.kernel_size - size) // 2
        weights, biases = [], []
        for tensors in slices:
            channels = len(tensors["conv.bias"]) // len(sizes)
            rows = slice(group * channels, (group + 1) * channels)
            mask = tensors["w_mask"][rows, 0] != 0
            if not mask[:, rim : rim + size].all() or mask.sum() != mask[:, rim : rim + size].sum():
                raise UserError(
                    f"{name}: kernel group {group} has {int(mask[0].sum())} taps in the checkpoint, but "
                    f"kernel_size={config.kernel_size} with num_heads={config.num_heads} gives {size}"
                )
            weights.append(tensors["conv.weight"][rows, :, rim : rim + size])
            biases.append(tensors["conv.bias"][rows])
        converted[f"{name}.convolutions.{group}.weight"] = torch.cat(weights)
        converted[f"{name}.convolutions.{group}.bias"] = torch.cat(biases)
    return converted
