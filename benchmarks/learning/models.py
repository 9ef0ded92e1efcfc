"""The models that are compared: those of mixlm, and transformers' behind one small adapter."""

from typing import Any

from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    ConvBertConfig,
    ElectraConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaPreLayerNormConfig,
)

from mixlm import MixLMConfig, MixLMForPreTraining, MixLMSwitchConfig, MixLMSwitchForPreTraining
from mixlm.heads import (
    IGNORE,
    MeanPooler,
    PreTrainingOutput,
    RetrievalOutput,
    SentenceOrderHead,
    classification_loss,
    masked_lm_loss,
)
from mixlm.training.optimization import embedding_tables_of

HIDDEN, LAYERS, HEADS, FEED_FORWARD, POSITIONS = 256, 4, 4, 1024, 512
OWN = {
    "mixlm": (MixLMConfig, MixLMForPreTraining, "mixlm-mini"),
    "switch": (MixLMSwitchConfig, MixLMSwitchForPreTraining, "mixlm-switch-mini"),
}
SHAPE = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": FEED_FORWARD,
    "max_position_embeddings": POSITIONS,
    "attn_implementation": "sdpa",
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# What a peer has beside that. BERT before LayerNorm moved into the branches is transformers' "bert", after it
# "roberta-prelayernorm", which is the same model but for that.
PEERS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "bert": (BertConfig, NO_DROPOUT),
    "bert-pre-ln": (RobertaPreLayerNormConfig, {**NO_DROPOUT, "max_position_embeddings": POSITIONS + 1}),
    "albert": (AlbertConfig, {**NO_DROPOUT, "embedding_size": 128}),
    "convbert": (ConvBertConfig, {**NO_DROPOUT, "embedding_size": HIDDEN, "attn_implementation": "eager"}),
    "electra": (ElectraConfig, {**NO_DROPOUT, "embedding_size": 128}),
    # Gated: two matrices go in, so that two thirds of the width have as many parameters.
    "modernbert": (ModernBertConfig, {"intermediate_size": 2 * FEED_FORWARD // 3}),
}


class PeerForPreTraining(PreTrainedModel):
    """One of transformers' models for masked tokens, with the inputs and outputs that mixlm's training loop knows.

    Its own head scores the labelled tokens only, as mixlm's does; sentence order has mixlm's head on the first token.

    Args:
        config: of the peer, with the field `pretraining_objective` set to "sop".
    """

    config_class = PreTrainedConfig
    base_model_prefix = "masked_lm"
    _supports_sdpa = True

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.masked_lm = AutoModelForMaskedLM.from_config(config)
        self.sop_head = SentenceOrderHead(config)
        self.takes_token_types = hasattr(config, "type_vocab_size") and config.type_vocab_size > 1
        self.post_init()

    @property
    def base_model(self) -> nn.Module:
        """The encoder without its heads, as with mixlm's models."""
        return self.masked_lm.base_model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        sentence_order_label: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> PreTrainingOutput:
        """As `MixLMForPreTraining`; all inputs are [batch, length] but for `sentence_order_label` [batch]."""
        types = {"token_type_ids": token_type_ids} if self.takes_token_types else {}
        hidden = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        labelled = labels != IGNORE
        logits, order = self._scores(hidden[labelled]), self.sop_head(hidden)
        return PreTrainingOutput(
            mlm_loss=masked_lm_loss(logits, labels[labelled]),
            sop_loss=classification_loss(order, sentence_order_label),
            prediction_logits=logits,
            sop_logits=order,
        )

    def _scores(self, hidden: Tensor) -> Tensor:
        """The peer's own masked-token head on [labelled, hidden]."""
        head = self.masked_lm
        match self.config.model_type:
            case "bert":
                return head.cls(hidden)
            case "roberta-prelayernorm":
                return head.lm_head(hidden)
            case "albert":
                return head.predictions(hidden)
            case "convbert" | "electra":
                return head.generator_lm_head(head.generator_predictions(hidden))
            case "modernbert":
                return head.decoder(head.head(hidden))
        raise ValueError(f"no head is known of {self.config.model_type}")


class PeerForRetrieval(PreTrainedModel):
    """One of transformers' encoders with the mean over tokens as the vector of a text, as mixlm's small presets have.

    Args:
        config: of the peer.
    """

    config_class = PreTrainedConfig
    base_model_prefix = "encoder"
    _supports_sdpa = True

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        # What an index asks about an encoder.
        config.pooler, config.normalize_embeddings, config.two_towers = "mean", False, False
        self.encoder = AutoModel.from_config(config)
        self.pooler = MeanPooler()
        self.post_init()

    @classmethod
    def load(cls, folder: str, **fields: Any) -> tuple["PeerForRetrieval", list[str]]:
        """As `mixlm.encoder.load_for_retrieval`; a peer has none of the fields."""
        encoder = AutoModel.from_pretrained(folder)
        model = cls(encoder.config)
        model.encoder = encoder
        return model, []

    @classmethod
    def load_fine_tuned(cls, folder: str) -> "PeerForRetrieval":
        """What run_ict.py has left of one."""
        return cls.from_pretrained(folder, config=AutoConfig.from_pretrained(folder))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        context_input_ids: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
        context_first_rows: Tensor | None = None,
    ) -> RetrievalOutput:
        """As `RetrievalHeads.forward`, without a loss: that is the objective's."""
        return RetrievalOutput(
            embeddings=self._embed(input_ids, attention_mask),
            context_embeddings=self._embed(context_input_ids, context_attention_mask),
        )

    def _embed(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
        if input_ids is None:
            return None
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.pooler(hidden, attention_mask)


def build_model(kind: str, fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """A new model, from torch's global generator.

    Args:
        kind: a name of `OWN` or `PEERS`.
        fields: of its configuration, where it is to differ from mixlm-mini, mixlm-switch-mini or `SHAPE`.
        tokenizer: for the vocabulary's size and the ids of special tokens.
    """
    common = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if kind in OWN:
        config_class, model_class, preset = OWN[kind]
        return model_class(config_class.from_preset(preset, **{**common, **fields}))
    config_class, own = PEERS[kind]
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep")}
    ids |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    config = config_class(**{**SHAPE, **common, **ids, **own, **fields})
    config.pretraining_objective = "sop"
    return PeerForPreTraining(config)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """All parameters, and those that are in no embedding table."""
    total = sum(parameter.numel() for parameter in model.parameters())
    tables = embedding_tables_of(model)
    return {"parameters": total, "non_embedding_parameters": total - sum(table.numel() for table in tables)}
