"""Both encoders once more, as plainly as they can be written: what the tests of the real models compare with.

Nothing here is fast and nothing is imported from mixlm. Convolutions are padded to the largest kernel and masked, as
in the older implementation; slices, heads and tokens are taken one by one in Python loops. The functions read a
model's configuration and, by name, its own parameters, so that a gradient flows back to them.

Letters of the shapes: batch B, length L, hidden size C, slices E, slice width D = C / E, kernel groups G.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

IGNORE = -100


@dataclass
class Encoded:
    """hidden_states has one entry more than there are layers; the last one is the encoder's output."""

    hidden_states: list[Tensor]
    attentions: list[Tensor]
    router_logits: list[Tensor]
    aux_loss: Tensor | None

    @property
    def last_hidden_state(self) -> Tensor:
        return self.hidden_states[-1]


class Oracle:
    """The plain form of one model of mixlm, bare or with a head."""

    def __init__(self, model: torch.nn.Module):
        self.config = model.config
        self.weights = {name.removeprefix("encoder."): weight for name, weight in model.named_parameters()}

    # -- parts -------------------------------------------------------------------------------------------------------

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = (centred * centred).mean(dim=-1, keepdim=True)
        normal = centred / torch.sqrt(variance + self.config.LN_eps)
        return normal * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def act_fn(self, x: Tensor) -> Tensor:
        if self.config.act_fn == "gelu":
            return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        if self.config.act_fn == "relu":
            return torch.where(x > 0, x, torch.zeros_like(x))
        return x / (1 + torch.exp(-x))

    def shares(self, part: str) -> bool:
        shared = {"all": ["attention", "ffn", "norms"], "ffn": ["ffn"], "attention": ["attention"]}
        return part in shared[self.config.shared_parameters]

    def owner(self, layer: int, part: str) -> int:
        """The number under which the weights of a layer's part are stored."""
        first_of_group = layer - layer % self.config.layer_group
        return first_of_group // self.config.layer_group if self.shares(part) else layer

    # -- the encoder -------------------------------------------------------------------------------------------------

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        training: bool = False,
    ) -> Encoded:
        """Encode without dropout. `training` only makes the capacity of experts count."""
        config = self.config
        real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        token_type_ids = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        words = self.weights["embeddings.word_embeddings.weight"][input_ids]
        positions = self.weights["embeddings.position_embeddings.weight"][: input_ids.shape[1]]
        types = self.weights["embeddings.token_type_embeddings.weight"][token_type_ids]
        hidden = self.norm(words + positions + types, "embeddings.norm")

        encoded = Encoded([hidden], [], [], None)
        scores = None
        for layer in range(config.num_hidden_layers):
            norms = f"stack.layers.{self.owner(layer, 'norms')}"
            attention = f"stack.attentions.{self.owner(layer, 'attention')}"
            feed_forward = f"stack.feed_forwards.{self.owner(layer, 'ffn')}"
            if config.ln_pos == 0:
                attended, scores = self.attention(
                    self.norm(hidden, f"{norms}.attention_norm"), scores, real, attention, encoded
                )
                hidden = hidden + attended
                normal = self.norm(hidden, f"{norms}.feed_forward_norm")
                hidden = hidden + self.feed_forward(normal, real, feed_forward, training, encoded)
            else:
                attended, scores = self.attention(hidden, scores, real, attention, encoded)
                hidden = self.norm(hidden + attended, f"{norms}.attention_norm")
                transformed = self.feed_forward(hidden, real, feed_forward, training, encoded)
                hidden = self.norm(hidden + transformed, f"{norms}.feed_forward_norm")
            encoded.hidden_states.append(hidden)
        if config.final_layer_norm:
            encoded.hidden_states[-1] = self.norm(hidden, "stack.final_norm")
        if encoded.router_logits:
            encoded.aux_loss = sum(self.router_loss(logits, real) for logits in encoded.router_logits)
        return encoded

    def attention(
        self, hidden: Tensor, previous: list[Tensor] | None, real: Tensor, name: str, encoded: Encoded
    ) -> tuple[Tensor, list[Tensor] | None]:
        """[B, L, C] -> [B, L, C] and the raw scores of each map, [B, L, L]."""
        is_switch = f"{name}.query.weight" in self.weights
        maps = self.config.num_heads if is_switch else self.config.n_experts
        width = self.config.hidden_size // maps
        if is_switch:
            queries = self.linear(hidden, f"{name}.query").split(width, dim=-1)
            keys = self.linear(hidden, f"{name}.key").split(width, dim=-1)
            values = self.linear(hidden, f"{name}.value").split(width, dim=-1)
        else:
            queries = values = hidden.split(width, dim=-1)
            keys = [
                self.masked_convolution(queries[number], number, real, f"{name}.key", width) for number in range(maps)
            ]
        outputs, raw_scores, attentions = [], [], []
        for number in range(maps):
            scores = queries[number] @ keys[number].transpose(1, 2) / math.sqrt(width)
            if previous is not None:
                scores = scores + previous[number]
            visible = torch.where(real[:, None, :], scores, torch.full_like(scores, -math.inf))
            attention = torch.softmax(visible, dim=-1)
            outputs.append(attention @ values[number])
            raw_scores.append(scores)
            attentions.append(attention)
        encoded.attentions.append(torch.stack(attentions, dim=1))
        attended = self.linear(torch.cat(outputs, dim=-1), f"{name}.o_proj")
        return attended, raw_scores if self.config.residual_attention else None

    def feed_forward(self, hidden: Tensor, real: Tensor, name: str, training: bool, encoded: Encoded) -> Tensor:
        if f"{name}.router.weight" in self.weights:
            return self.switch(hidden, real, name, training, encoded)
        slices = self.config.n_experts
        convolved = [
            self.masked_convolution(part, number, real, f"{name}.convolution", self.config.ff_dim // slices)
            for number, part in enumerate(hidden.split(self.config.hidden_size // slices, dim=-1))
        ]
        return self.linear(self.act_fn(torch.cat(convolved, dim=-1)), f"{name}.dense")

    def masked_convolution(self, part: Tensor, number: int, real: Tensor, name: str, channels: int) -> Tensor:
        """Slice `number`, [B, L, D] -> [B, L, channels]: one grouped Conv1d of the largest kernel with a 0/1 mask."""
        groups, largest = self.config.num_heads, self.config.kernel_size
        rows = channels // groups
        full = torch.ones(channels, part.shape[-1] // groups, largest, dtype=part.dtype)  # ones: the mask must work
        mask = torch.zeros_like(full)
        bias = []
        taps = full.clone()
        for group in range(groups):
            stored = self.weights[f"{name}.convolutions.{group}.weight"][number * rows : (number + 1) * rows]
            rim = (largest - stored.shape[-1]) // 2
            ours = slice(group * rows, (group + 1) * rows)
            taps[ours, :, rim : largest - rim] = stored
            mask[ours, :, rim : largest - rim] = 1
            bias.append(self.weights[f"{name}.convolutions.{group}.bias"][number * rows : (number + 1) * rows])
        part = torch.where(real[..., None], part, torch.zeros_like(part))
        convolved = torch.nn.functional.conv1d(
            part.transpose(1, 2), taps * mask, torch.cat(bias), padding=largest // 2, groups=groups
        )
        return convolved.transpose(1, 2)

    def switch(self, hidden: Tensor, real: Tensor, name: str, training: bool, encoded: Encoded) -> Tensor:
        """Token after token through the expert its router likes best; in each sequence an expert has its capacity."""
        n_experts = self.config.n_experts
        logits = self.linear(hidden, f"{name}.router")
        encoded.router_logits.append(logits)
        sequences = []
        for sequence, its_logits, its_real in zip(hidden, logits, real, strict=True):
            tokens = int(its_real.sum())
            capacity = math.ceil(Fraction(str(self.config.capacity_factor)) * tokens / n_experts)
            taken = [0] * n_experts
            outputs = []
            for token, token_logits, is_real in zip(sequence, its_logits, its_real, strict=True):
                probabilities = torch.softmax(token_logits, dim=-1)
                expert = int(probabilities.argmax())
                if not is_real or (training and taken[expert] == capacity):
                    outputs.append(torch.zeros_like(token))
                    continue
                taken[expert] += 1
                up = self.weights[f"{name}.experts.up_weight"][expert] @ token
                up = self.act_fn(up + self.weights[f"{name}.experts.up_bias"][expert])
                down = self.weights[f"{name}.experts.down_weight"][expert] @ up
                down = down + self.weights[f"{name}.experts.down_bias"][expert]
                probability = probabilities[expert]
                if self.config.router_scaling == "straight-through":
                    probability = probability / probability.detach()
                outputs.append(down * probability)
            sequences.append(torch.stack(outputs))
        return torch.stack(sequences)

    def router_loss(self, logits: Tensor, real: Tensor) -> Tensor:
        """Mean over sequences of coef x E x sum_e f_e P_e + coef x mean of logsumexp², over the real tokens."""
        losses = []
        for its_logits, its_real in zip(logits, real, strict=True):
            tokens = its_logits[its_real]
            probabilities = torch.softmax(tokens, dim=-1)
            balance = 0
            for expert in range(self.config.n_experts):
                share = (probabilities.argmax(dim=-1) == expert).sum() / len(tokens)
                balance = balance + share * probabilities[:, expert].mean()
            z = torch.log(torch.exp(tokens).sum(dim=-1)).square().mean()
            losses.append(
                self.config.router_aux_loss_coef * self.config.n_experts * balance + self.config.router_z_loss_coef * z
            )
        return sum(losses) / len(losses)

    # -- heads and losses --------------------------------------------------------------------------------------------

    def mlm_logits(self, hidden: Tensor) -> Tensor:
        """Logits of every position, by the decoder that is tied to the word embeddings."""
        transformed = self.norm(self.act_fn(self.linear(hidden, "mlm_head.dense")), "mlm_head.norm")
        return (
            transformed @ self.weights["embeddings.word_embeddings.weight"].T + self.weights["mlm_head.decoder.bias"]
        )

    def sop_logits(self, hidden: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.linear(hidden[:, 0], "sop_head.dense")), "sop_head.classifier")

    def pooled(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        real = torch.ones(hidden.shape[:2]).bool() if attention_mask is None else attention_mask.bool()
        rows = []
        for sequence, its_real in zip(hidden, real, strict=True):
            if self.config.pooler == "cls":
                rows.append(sequence[0])
            elif self.config.pooler == "mean":
                rows.append(sequence[its_real].mean(dim=0))
            else:
                weight = self.weights["pooler.weight"]
                rows.append(sum(weight[place] * sequence[place] for place in range(len(sequence)) if its_real[place]))
        return torch.stack(rows)


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[..., classes] and [...]: the mean of -log p(label) over the labels that are not -100; 0 where all are."""
    losses = [
        torch.log(torch.exp(row - row.max()).sum()) + row.max() - row[label]
        for row, label in zip(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).tolist(), strict=True)
        if label != IGNORE
    ]
    return sum(losses) / len(losses) if losses else logits.sum() * 0


def in_batch_cross_entropy(queries: Tensor, contexts: Tensor) -> Tensor:
    """Mean over queries of -log softmax(q_i · c_j)_i."""
    return mean_cross_entropy(queries @ contexts.T, torch.arange(len(queries)))


# -- models to compare -----------------------------------------------------------------------------------------------


def randomize(model: torch.nn.Module, seed: int = 0, std: float = 0.3) -> torch.nn.Module:
    """Give every parameter, biases and LayerNorms too, a value that matters. Returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return model


def small_model(model_class: type, seed: int = 0, **fields) -> torch.nn.Module:
    """A small model in float64 with random weights and without dropout, in evaluation mode. While training, Switch
    has so little capacity that tokens are dropped."""
    config_class = model_class.config_class
    sizes = {
        "vocab_size": 31,
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "num_heads": 2,
        "n_experts": 3,
        "ff_dim": 36,
        "max_position_embeddings": 20,
        "dropout_prob": 0.0,
    }
    sizes |= {"kernel_size": 5} if config_class.model_type == "mixlm" else {"capacity_factor": 0.8}
    model = model_class(config_class(**{**sizes, **fields}))
    return randomize(model.double(), seed).eval()


def random_batch(config, lengths: list[int], seed: int = 0, padded_to: int | None = None) -> dict[str, Tensor]:
    """input_ids, token_type_ids and attention_mask of texts of these lengths. What stands in the padding is garbage:
    the first id, the last one, and others."""
    generator = torch.Generator().manual_seed(seed)
    width = padded_to or max(lengths)
    shape = (len(lengths), width)
    input_ids = torch.randint(config.vocab_size, shape, generator=generator)
    token_type_ids = torch.randint(config.type_vocab_size, shape, generator=generator)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for row, length in enumerate(lengths):
        attention_mask[row, :length] = 1
        input_ids[row, length : length + 1] = config.vocab_size - 1
        input_ids[row, length + 1 : length + 2] = 0
    return {"input_ids": input_ids, "token_type_ids": token_type_ids, "attention_mask": attention_mask}
