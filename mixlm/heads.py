"""The heads, written once for both encoder families.

A head class is a mixin over a family's PreTrainedModel. It builds the family's encoder (`base_model_class`) and adds
its own layers, its loss and its output. Losses are means over what they weigh: MLM over masked tokens, SOP, ICT and
question answering over rows; the training loop turns them back into sums to add micro-batches and ranks exactly.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

IGNORE = -100  # a label that is not scored
INPUTS_OF_LOSS = {
    "sop": ("labels", "sentence_order_label"),
    "ict": ("labels", "context_input_ids", "context_labels"),
}


@dataclass
class EncoderOutput(ModelOutput):
    """Output of a bare encoder.

    Args:
        last_hidden_state: [batch, length, hidden].
        aux_loss: Switch: the weighted load-balancing and z losses, a scalar; in training mode, and with router_logits.
        hidden_states, attentions, router_logits: one entry a layer, on request.
    """

    last_hidden_state: Tensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class PreTrainingOutput(ModelOutput):
    """Output of ForPreTraining.

    Args:
        loss: mlm_loss + sop_loss or ict_loss + aux_loss; the parts follow, scalars.
        prediction_logits: [batch, length, vocabulary]; with labels [labelled tokens, vocabulary] in row order (for ICT
            the query's, then the context's).
        sop_logits: [batch, 2], index 0 = original order, 1 = swapped.
        embeddings, context_embeddings: ICT: [batch, hidden].
        hidden_states, attentions, router_logits: of the first input (ICT: the query), one entry a layer, on request.
    """

    loss: Tensor | None = None
    mlm_loss: Tensor | None = None
    sop_loss: Tensor | None = None
    ict_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    sop_logits: Tensor | None = None
    embeddings: Tensor | None = None
    context_embeddings: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class MaskedLMOutput(ModelOutput):
    """Output of ForMaskedLM.

    Args:
        logits: [batch, length, vocabulary]; in training mode with labels [labelled tokens, vocabulary].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    mlm_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class QuestionAnsweringOutput(ModelOutput):
    """Output of ForQuestionAnswering: `start_logits` and `end_logits` are [batch, length]."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class RetrievalOutput(ModelOutput):
    """Output of ForRetrieval: `embeddings` [batch, hidden] and `context_embeddings` [contexts, hidden]."""

    loss: Tensor | None = None
    embeddings: Tensor | None = None
    context_embeddings: Tensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


class MaskedLMHead(nn.Module):
    """dense, activation, LayerNorm, decoder tied to the word embeddings: [..., hidden] -> [..., vocabulary]."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.act_fn]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.LN_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.norm(self.act_fn(self.dense(hidden))))


class SentenceOrderHead(nn.Module):
    """tanh(dense(h_[CLS])), then two classes: [batch, length, hidden] -> [batch, 2]."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.classifier(torch.tanh(self.dense(hidden[:, 0])))


class PositionPooler(nn.Module):
    """A learned weight per position: pooled = sum over the real tokens of w_t h_t."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.max_position_embeddings))

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        weight = self.weight[: hidden.shape[1]].expand(hidden.shape[:2])
        if attention_mask is not None:
            weight = weight * attention_mask.bool()
        return (weight[:, None].to(hidden.dtype) @ hidden).squeeze(1)


class MeanPooler(nn.Module):
    """The mean over the real tokens."""

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        if attention_mask is None:
            return hidden.mean(dim=1)
        weight = attention_mask.bool().to(hidden.dtype)[..., None]
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


class FirstTokenPooler(nn.Module):
    """The hidden state of [CLS]."""

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        return hidden[:, 0]


def build_pooler(config) -> nn.Module:
    """The module that turns [batch, length, hidden] and a mask into [batch, hidden], by `config.pooler`."""
    if config.pooler == "decoder":
        return PositionPooler(config)
    return MeanPooler() if config.pooler == "mean" else FirstTokenPooler()


@torch.no_grad()
def initialize(module: nn.Module) -> None:
    """Initial values of the parameters that the heads hold outside torch's own layers."""
    if isinstance(module, PositionPooler):
        # A mean over 32 tokens. Much smaller, and inner products are too alike for ICT to leave chance; much larger,
        # and the longest context wins every query.
        init.constant_(module.weight, 1 / 32)


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or in float64 if it is: what sums and exponentials need."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def masked_lm_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over labelled tokens, [tokens, vocabulary] and [tokens]; 0 where no token is labelled."""
    return F.cross_entropy(at_least_float32(logits), targets, reduction="sum") / max(len(targets), 1)


def classification_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the rows whose target is not -100, [rows, classes] and [rows]; 0 where none is."""
    rows = (targets != IGNORE).sum().clamp(min=1)
    return F.cross_entropy(at_least_float32(logits), targets, ignore_index=IGNORE, reduction="sum") / rows


def position_loss(logits: Tensor, positions: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Mean cross-entropy of `positions` [batch] or [batch, 1] among the real tokens of `logits` [batch, length].

    Padding is no candidate, and a position outside the text is not scored.
    """
    positions, length = positions.reshape(len(logits)), logits.shape[1]
    inside = (positions >= 0) & (positions < length)
    if attention_mask is not None:
        real = attention_mask.bool()
        inside &= real.gather(1, positions.clamp(0, length - 1)[:, None])[:, 0]
        logits = logits.masked_fill(~real, torch.finfo(logits.dtype).min)
    return classification_loss(logits, positions.masked_fill(~inside, IGNORE))


def retrieval_scores(embeddings: Tensor, context_embeddings: Tensor) -> Tensor:
    """The inner products of each query with every context, in float32: [queries, hidden], [contexts, hidden]."""
    with torch.autocast(embeddings.device.type, enabled=False):  # inner products of whole texts overflow fp16
        return at_least_float32(embeddings) @ at_least_float32(context_embeddings).T


def in_batch_retrieval_loss(
    embeddings: Tensor, context_embeddings: Tensor, context_first_rows: Tensor | None = None
) -> Tensor:
    """Softmax over the inner products of each query with every context of the batch; one of them is its own.

    (ICT: ORQA, arXiv:1906.00300, section 4; in-batch negatives: DPR, arXiv:2004.04906, section 3.2.)

    Args:
        embeddings: [batch, hidden].
        context_embeddings: [contexts, hidden].
        context_first_rows: which context is each query's own, [batch]; None = that of the same number.
    """
    scores = retrieval_scores(embeddings, context_embeddings)
    if context_first_rows is None:
        if scores.shape[0] != scores.shape[1]:
            raise ValueError(
                f"the retrieval loss of {scores.shape[0]} queries and {scores.shape[1]} contexts needs "
                "context_first_rows"
            )
        context_first_rows = torch.arange(len(scores), device=scores.device)
    return F.cross_entropy(scores, context_first_rows)


def sum_losses(*losses: Tensor | None) -> Tensor:
    """The sum of the losses that are there."""
    return torch.stack([loss for loss in losses if loss is not None]).sum()


def mean_aux_loss(first: EncoderOutput, second: EncoderOutput) -> Tensor | None:
    """The auxiliary loss of queries and contexts: a text weighs the same wherever it stands."""
    if first.aux_loss is None:
        return None
    rows, others = len(first.last_hidden_state), len(second.last_hidden_state)
    return (rows * first.aux_loss + others * second.aux_loss) / (rows + others)


def require(given: dict[str, Any], purpose: str) -> bool:
    """Whether every input of an objective is given.

    Raises:
        ValueError: some of them are given and others lacking: a loss would silently be another one.
    """
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        present = [name for name in given if name not in missing]
        raise ValueError(f"{purpose} needs {', '.join(missing)} beside {', '.join(present)}")
    return not missing


def layer_outputs(encoded: EncoderOutput) -> dict[str, Any]:
    """The fields of an encoder's output that every head hands on."""
    return {
        "aux_loss": encoded.aux_loss,
        "hidden_states": encoded.hidden_states,
        "attentions": encoded.attentions,
        "router_logits": encoded.router_logits,
    }


class EncoderHeads:
    """What every head shares: the encoder under `self.encoder`, and the layers that `build_heads` adds."""

    base_model_class: type[nn.Module]

    def __init__(self, config):
        super().__init__(config)
        self.encoder = self.base_model_class(config)
        self.build_heads(config)
        self.post_init()

    def encode(self, *inputs: Tensor | None, **kwargs: Any) -> EncoderOutput:
        """The encoder's output by name, whatever `config.return_dict` says."""
        return self.encoder(*inputs, **{**kwargs, "return_dict": True})


class MaskedLMHeadAccess:
    """Where transformers finds the decoder that is tied to the word embeddings."""

    _tied_weights_keys = {"mlm_head.decoder.weight": "encoder.embeddings.word_embeddings.weight"}

    def get_output_embeddings(self) -> nn.Linear:
        return self.mlm_head.decoder

    def set_output_embeddings(self, decoder: nn.Linear) -> None:
        self.mlm_head.decoder = decoder

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers, which leaves the bias of new tokens at 0; that of the others is near the logarithm of
        how often they occur, and a new token would be the answer everywhere. It gets their mean."""
        before = len(self.mlm_head.decoder.bias)
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        bias = self.mlm_head.decoder.bias.data
        bias[before:] = bias[:before].mean()
        return embeddings

    def predict_tokens(self, hidden: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Vocabulary logits and labels of the labelled tokens alone (6 of 7 tokens are not, and the decoder is the
        largest matrix of a small model), or the logits of all tokens where there are no labels."""
        if labels is None:
            return self.mlm_head(hidden), None
        if labels.shape != hidden.shape[:2]:
            raise ValueError(f"labels have shape {tuple(labels.shape)}, the input has {tuple(hidden.shape[:2])}")
        labelled = labels != IGNORE
        return self.mlm_head(hidden[labelled]), labels[labelled]


class MaskedLMHeads(MaskedLMHeadAccess, EncoderHeads):
    """ForMaskedLM."""

    def build_heads(self, config) -> None:
        self.mlm_head = MaskedLMHead(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """Inputs as in the encoder; `labels` [batch, length] with -100 where no token is to be predicted."""
        encoded = self.encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits, targets = self.predict_tokens(encoded.last_hidden_state, labels)
        loss = mlm_loss = None
        if labels is not None:
            mlm_loss = masked_lm_loss(logits, targets)
            loss = sum_losses(mlm_loss, encoded.aux_loss)
            if not self.training:  # whoever evaluates pairs logits with tokens, as transformers' Trainer does
                logits = self.mlm_head(encoded.last_hidden_state)
        return MaskedLMOutput(loss=loss, logits=logits, mlm_loss=mlm_loss, **layer_outputs(encoded))


class QuestionAnsweringHeads(EncoderHeads):
    """ForQuestionAnswering."""

    def build_heads(self, config) -> None:
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringOutput:
        """Inputs as in the encoder; `start_positions` and `end_positions` [batch], token positions.

        A position outside the text is not scored: the answer lies outside this window.
        """
        encoded = self.encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        start_logits, end_logits = self.qa_outputs(encoded.last_hidden_state).unbind(dim=-1)
        loss = None
        if require({"start_positions": start_positions, "end_positions": end_positions}, "question answering"):
            start_loss = position_loss(start_logits, start_positions, attention_mask)
            end_loss = position_loss(end_logits, end_positions, attention_mask)
            loss = sum_losses((start_loss + end_loss) / 2, encoded.aux_loss)
        return QuestionAnsweringOutput(
            loss=loss, start_logits=start_logits, end_logits=end_logits, **layer_outputs(encoded)
        )


class RetrievalHeads(EncoderHeads):
    """ForRetrieval: one encoder for queries and contexts, or with `config.two_towers` one for each."""

    def build_heads(self, config) -> None:
        self.pooler = build_pooler(config)
        if config.two_towers:
            self.context_encoder = self.base_model_class(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        context_input_ids: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
        context_first_rows: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RetrievalOutput:
        """The query as `input_ids` (inputs as in the encoder), contexts, or both, and then there is a loss.

        Args:
            context_input_ids, context_attention_mask: [contexts, context length]; all contexts of the batch that are
                not a query's own are its negatives. The mask defaults to no padding.
            context_first_rows: [batch], the row of each query's own context. The rows after it, to the next query's
                own, are its hard negatives. Default: query i has context i alone.
        """
        if context_input_ids is None:
            lacking = {"context_attention_mask": context_attention_mask, "context_first_rows": context_first_rows}
            for name, value in lacking.items():
                if value is not None:
                    raise ValueError(f"the retrieval loss needs context_input_ids beside {name}")
        encoded = encoded_context = None
        if input_ids is not None or inputs_embeds is not None or context_input_ids is None:
            encoded = self.encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
            embeddings = self.embed(encoded, attention_mask)
        if context_input_ids is not None:
            encoded_context = self.encode_context(context_input_ids, context_attention_mask, **kwargs)
            context_embeddings = self.embed(encoded_context, context_attention_mask)
        if encoded is None:
            return RetrievalOutput(context_embeddings=context_embeddings, **layer_outputs(encoded_context))
        if encoded_context is None:
            return RetrievalOutput(embeddings=embeddings, **layer_outputs(encoded))
        aux_loss = mean_aux_loss(encoded, encoded_context)
        loss = in_batch_retrieval_loss(embeddings, context_embeddings, context_first_rows)
        return RetrievalOutput(
            loss=sum_losses(loss, aux_loss),
            embeddings=embeddings,
            context_embeddings=context_embeddings,
            **{**layer_outputs(encoded), "aux_loss": aux_loss},
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; of both towers."""
        if self.config.two_towers:
            self.context_encoder.resize_token_embeddings(*args, **kwargs)
        return super().resize_token_embeddings(*args, **kwargs)

    def embed(self, encoded: EncoderOutput, attention_mask: Tensor | None) -> Tensor:
        """The vectors of texts, [batch, hidden]."""
        vectors = self.pooler(encoded.last_hidden_state, attention_mask)
        if not self.config.normalize_embeddings:
            return vectors
        # What keeps the vector of padding alone from a division by 0 would be 0 in 16 bits.
        return F.normalize(at_least_float32(vectors), dim=-1).to(vectors.dtype)

    def encode_context(self, *inputs: Tensor | None, **kwargs: Any) -> EncoderOutput:
        """As `encode`, for contexts."""
        encoder = self.context_encoder if self.config.two_towers else self.encoder
        return encoder(*inputs, **{**kwargs, "return_dict": True})


class PreTrainingHeads(MaskedLMHeadAccess, EncoderHeads):
    """ForPreTraining: MLM and SOP, or MLM and ICT, by `config.pretraining_objective`."""

    def build_heads(self, config) -> None:
        self.mlm_head = MaskedLMHead(config)
        if config.pretraining_objective == "sop":
            self.sop_head = SentenceOrderHead(config)
        else:
            self.pooler = build_pooler(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        sentence_order_label: Tensor | None = None,
        context_input_ids: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
        context_labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PreTrainingOutput:
        """Predict, and with labels compute the losses.

        Args:
            input_ids ... inputs_embeds: as in the encoder; for ICT this is the query.
            labels: [batch, length], -100 where no token is to be predicted.
            sentence_order_label: SOP: [batch], 0 = original order, 1 = swapped, -100 = not scored.
            context_input_ids, context_attention_mask, context_labels: ICT: [batch, context length]; context i is the
                block that query i was taken from, the other contexts of the batch are its negatives.

        Raises:
            ValueError: some inputs of the objective's loss are given and others lacking, or they belong to the
                other objective.
        """
        has_loss = self._has_loss(
            labels=labels,
            sentence_order_label=sentence_order_label,
            context_input_ids=context_input_ids,
            context_attention_mask=context_attention_mask,
            context_labels=context_labels,
        )
        encoded = self.encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits, targets = self.predict_tokens(encoded.last_hidden_state, labels)
        aux_loss = encoded.aux_loss
        sop_logits = embeddings = context_embeddings = mlm_loss = sop_loss = ict_loss = None
        if self.config.pretraining_objective == "sop":
            sop_logits = self.sop_head(encoded.last_hidden_state)
            if has_loss:
                sop_loss = classification_loss(sop_logits, sentence_order_label)
        else:
            embeddings = self.pooler(encoded.last_hidden_state, attention_mask)
            if has_loss:
                encoded_context = self.encode(context_input_ids, context_attention_mask, **kwargs)
                context_embeddings = self.pooler(encoded_context.last_hidden_state, context_attention_mask)
                ict_loss = in_batch_retrieval_loss(embeddings, context_embeddings)
                aux_loss = mean_aux_loss(encoded, encoded_context)
                context_logits, context_targets = self.predict_tokens(
                    encoded_context.last_hidden_state, context_labels
                )
                logits, targets = torch.cat([logits, context_logits]), torch.cat([targets, context_targets])
        if has_loss:
            mlm_loss = masked_lm_loss(logits, targets)
        return PreTrainingOutput(
            loss=sum_losses(mlm_loss, sop_loss, ict_loss, aux_loss) if has_loss else None,
            mlm_loss=mlm_loss,
            sop_loss=sop_loss,
            ict_loss=ict_loss,
            prediction_logits=logits,
            sop_logits=sop_logits,
            embeddings=embeddings,
            context_embeddings=context_embeddings,
            **{**layer_outputs(encoded), "aux_loss": aux_loss},
        )

    def _has_loss(self, **given: Tensor | None) -> bool:
        """Whether the inputs of the objective's loss are there; raises as `forward` says."""
        objective = self.config.pretraining_objective
        needed = INPUTS_OF_LOSS[objective]
        optional = ("context_attention_mask",) if objective == "ict" else ()
        surplus = [name for name, value in given.items() if value is not None and name not in (*needed, *optional)]
        if surplus:
            raise ValueError(f"{', '.join(surplus)} given, but pretraining_objective is {objective!r}")
        has_loss = require({name: given[name] for name in needed}, f"the {objective} pretraining loss")
        if given["context_attention_mask"] is not None and not has_loss:
            raise ValueError("context_attention_mask is given without context_input_ids")
        return has_loss
