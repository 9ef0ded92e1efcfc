"""mixlm: MixLM and Switch encoders for transformers, for retrieval and machine reading in Korean and any language."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForTextEncoding,
)

from .configuration import MixLMConfig, MixLMSwitchConfig, preset_names
from .modeling_mixlm import (
    MixLMForMaskedLM,
    MixLMForPreTraining,
    MixLMForQuestionAnswering,
    MixLMForRetrieval,
    MixLMModel,
    MixLMPreTrainedModel,
)
from .modeling_switch import (
    MixLMSwitchForMaskedLM,
    MixLMSwitchForPreTraining,
    MixLMSwitchForQuestionAnswering,
    MixLMSwitchForRetrieval,
    MixLMSwitchModel,
    MixLMSwitchPreTrainedModel,
)

__version__ = "0.1.0"

# The Auto classes know both families from here on, and `save_pretrained` copies the model code into the folder.
for _config, _models in (
    (
        MixLMConfig,
        (MixLMModel, MixLMForPreTraining, MixLMForMaskedLM, MixLMForQuestionAnswering, MixLMForRetrieval),
    ),
    (
        MixLMSwitchConfig,
        (
            MixLMSwitchModel,
            MixLMSwitchForPreTraining,
            MixLMSwitchForMaskedLM,
            MixLMSwitchForQuestionAnswering,
            MixLMSwitchForRetrieval,
        ),
    ),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    _config.register_for_auto_class()
    for _auto, _model in zip(
        (
            AutoModel,
            AutoModelForPreTraining,
            AutoModelForMaskedLM,
            AutoModelForQuestionAnswering,
            AutoModelForTextEncoding,
        ),
        _models,
        strict=True,
    ):
        _auto.register(_config, _model, exist_ok=True)
        _model.register_for_auto_class(_auto.__name__)

__all__ = [
    "MixLMConfig",
    "MixLMPreTrainedModel",
    "MixLMModel",
    "MixLMForPreTraining",
    "MixLMForMaskedLM",
    "MixLMForQuestionAnswering",
    "MixLMForRetrieval",
    "MixLMSwitchConfig",
    "MixLMSwitchPreTrainedModel",
    "MixLMSwitchModel",
    "MixLMSwitchForPreTraining",
    "MixLMSwitchForMaskedLM",
    "MixLMSwitchForQuestionAnswering",
    "MixLMSwitchForRetrieval",
    "preset_names",
]
