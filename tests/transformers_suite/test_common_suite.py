"""Transformers' common model suite and `ConfigTester` on all classes of both families, in five shapes of the encoder.

What the suite cannot know about a model outside its repository is told to it here: the class names it looks up in its
own tables, the labels of the heads it has no name for, and where their outputs are. Every skip says why.
"""

import unittest

import pytest
import torch
from transformers.testing_utils import torch_device
from upstream import Unavailable, load_suite

import mixlm

try:
    modeling, configuration = load_suite()
except (Unavailable, OSError) as error:
    pytest.skip(f"transformers' common suite is not available: {error}", allow_module_level=True)

FAMILIES = {
    "mixlm": (
        mixlm.MixLMModel,
        mixlm.MixLMForPreTraining,
        mixlm.MixLMForMaskedLM,
        mixlm.MixLMForQuestionAnswering,
        mixlm.MixLMForRetrieval,
    ),
    "mixlm_switch": (
        mixlm.MixLMSwitchModel,
        mixlm.MixLMSwitchForPreTraining,
        mixlm.MixLMSwitchForMaskedLM,
        mixlm.MixLMSwitchForQuestionAnswering,
        mixlm.MixLMSwitchForRetrieval,
    ),
}
BATCH_SIZE, SEQUENCE_LENGTH, VOCABULARY = 13, 7, 99

# The suite decides by class name what a model is given and what is asked of it. Its own copies of transformers' tables
# are extended, so that transformers itself stays untouched.
for _table, _place in (
    ("MODEL_MAPPING_NAMES", 0),
    ("MODEL_FOR_PRETRAINING_MAPPING_NAMES", 1),
    ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", 2),
    ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", 3),
):
    _names = {family: classes[_place].__name__ for family, classes in FAMILIES.items()}
    setattr(modeling, _table, {**getattr(modeling, _table), **_names})

_known_output_tensors = modeling._get_output_tensors


def _get_output_tensors(outputs):
    """The suite's own choice, and the outputs of the heads it does not know."""
    return _known_output_tensors(outputs) + [
        outputs[name] for name in ("prediction_logits", "sop_logits", "embeddings") if name in outputs
    ]


modeling._get_output_tensors = _get_output_tensors


class ModelTester:
    """The sizes and inputs that the suite asks for, under the names it asks with."""

    batch_size, seq_length, vocab_size, is_training = BATCH_SIZE, SEQUENCE_LENGTH, VOCABULARY, True

    def __init__(self, config_class: type, fields: dict):
        self.config_class = config_class
        # One attention map per slice in MixLM, per head in Switch: with as many slices as heads the suite's
        # "num_attention_heads" is right for both.
        self.fields = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "n_experts": 4,
            "ff_dim": 64,
            "max_position_embeddings": 32,
            "initializer_range": 0.2,  # at 0.02 every attention is flat, and a wrong one compares equal
            **fields,
        }
        self.num_attention_heads = self.fields["num_heads"]
        self.hidden_size, self.num_hidden_layers = self.fields["hidden_size"], self.fields["num_hidden_layers"]

    def get_config(self):
        return self.config_class(**self.fields)

    def prepare_config_and_inputs_for_common(self):
        lengths = torch.arange(BATCH_SIZE)[:, None] % 3 + SEQUENCE_LENGTH - 2
        inputs = {
            "input_ids": torch.randint(1, VOCABULARY, (BATCH_SIZE, SEQUENCE_LENGTH)),
            "attention_mask": (torch.arange(SEQUENCE_LENGTH) < lengths).long(),
            "token_type_ids": torch.randint(0, 2, (BATCH_SIZE, SEQUENCE_LENGTH)),
        }
        return self.get_config(), {name: value.to(torch_device) for name, value in inputs.items()}


class CommonSuite(modeling.ModelTesterMixin):
    config_class: type
    fields: dict
    test_can_init_all_missing_weights_before_2023 = True  # not before 2023, but the file has no copyright line

    def setUp(self):
        torch.manual_seed(0)
        self.all_model_classes = FAMILIES[self.config_class.model_type]
        self.model_tester = ModelTester(self.config_class, self.fields)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if not return_labels:
            return inputs
        labels = torch.zeros(BATCH_SIZE, SEQUENCE_LENGTH, dtype=torch.long, device=torch_device)
        context = {"context_input_ids": inputs["input_ids"], "context_attention_mask": inputs["attention_mask"]}
        if model_class is self.all_model_classes[1]:
            if self.fields.get("pretraining_objective") == "ict":
                inputs.update(labels=labels, context_labels=labels, **context)
            else:
                inputs.update(labels=labels, sentence_order_label=labels[:, 0])
        elif model_class is self.all_model_classes[4]:
            inputs.update(context)
        return inputs

    def test_resize_position_vector_embeddings(self):
        self.skipTest("positions end at max_position_embeddings; resize_position_embeddings (optional) is not offered")

    def test_config(self):
        configuration.ConfigTester(self, self.config_class, hidden_size=32).run_common_tests()


class MixLMDenseTest(CommonSuite, unittest.TestCase):
    """As the older weights and BERT: post-LN, nothing shared."""

    config_class = mixlm.MixLMConfig
    fields = {"layer_group": 1, "ln_pos": 1}


class MixLMPreNormTest(CommonSuite, unittest.TestCase):
    """Ordinary attention through the attention interface, the other objective, another pooler."""

    config_class = mixlm.MixLMConfig
    fields = {"ln_pos": 0, "residual_attention": False, "pretraining_objective": "ict", "pooler": "mean"}


class MixLMSharedTest(CommonSuite, unittest.TestCase):
    """As ALBERT: one layer run twice."""

    config_class = mixlm.MixLMConfig
    fields = {"layer_group": 2, "ln_pos": 0}


class SwitchTest(CommonSuite, unittest.TestCase):
    config_class = mixlm.MixLMSwitchConfig
    fields = {"n_experts": 3, "ln_pos": 0}
