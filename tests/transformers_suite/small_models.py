"""Every head of both families, small, and batches for it."""

import torch

from mixlm import (
    MixLMForMaskedLM,
    MixLMForPreTraining,
    MixLMForQuestionAnswering,
    MixLMForRetrieval,
    MixLMModel,
    MixLMSwitchConfig,
    MixLMSwitchForMaskedLM,
    MixLMSwitchForPreTraining,
    MixLMSwitchForQuestionAnswering,
    MixLMSwitchForRetrieval,
    MixLMSwitchModel,
)

VOCABULARY = 50
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "n_experts": 4,
    "ff_dim": 64,
    "max_position_embeddings": 32,
    "kernel_size": 5,
}
ENCODERS = (MixLMModel, MixLMSwitchModel)
PRETRAINING = (MixLMForPreTraining, MixLMSwitchForPreTraining)
MASKED_LM = (MixLMForMaskedLM, MixLMSwitchForMaskedLM)
READERS = (MixLMForQuestionAnswering, MixLMSwitchForQuestionAnswering)
RETRIEVERS = (MixLMForRetrieval, MixLMSwitchForRetrieval)
# With the fields of the configuration that add layers to the head.
HEADS = (
    *((model_class, {}) for model_class in (*ENCODERS, *PRETRAINING, *MASKED_LM, *READERS, *RETRIEVERS)),
    *((model_class, {"pretraining_objective": "ict"}) for model_class in PRETRAINING),
    *((model_class, {"two_towers": True}) for model_class in RETRIEVERS),
)
NAMES = [" ".join([model_class.__name__, *map(str, fields.values())]) for model_class, fields in HEADS]


def build(model_class, **fields):
    sizes = {**SIZES, **fields}
    if model_class.config_class is MixLMSwitchConfig:
        del sizes["kernel_size"]
    torch.manual_seed(0)
    return model_class(model_class.config_class(**sizes)).eval()


def batch(rows=3, length=9):
    generator = torch.Generator().manual_seed(1)
    attention_mask = torch.ones(rows, length, dtype=torch.long)
    attention_mask[1, length // 2 :] = 0
    return {
        "input_ids": torch.randint(1, VOCABULARY, (rows, length), generator=generator),
        "attention_mask": attention_mask,
    }
