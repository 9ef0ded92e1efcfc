"""The formulas are those of the older implementation: its weights give its outputs."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, AutoModelForQuestionAnswering

from mixlm import MixLMForRetrieval, MixLMSwitchForRetrieval
from mixlm.conversion import convert_checkpoint

# The older GELU divides by 1.41421; everything else is equal.
TOLERANCE = {"atol": 1e-4, "rtol": 0}


def converted(golden, tmp_path, family, norm, head):
    out = tmp_path / "converted"
    stem = golden / f"{family}_{norm}"
    convert_checkpoint(f"{stem}_{head}_legacy_checkpoint.bin", f"{stem}_config.json", out, family, head)
    expected = load_file(f"{stem}_{head}_io.safetensors")
    return out, expected, {name: expected[name] for name in ("input_ids", "token_type_ids", "attention_mask")}


def load(model_class, folder):
    return model_class.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.mark.parametrize("norm", ["preln", "postln"])
@pytest.mark.parametrize("family", ["mixlm", "switch"])
class TestGoldenValues:
    def test_sentence_order_checkpoint(self, golden, tmp_path, family, norm):
        folder, expected, inputs = converted(golden, tmp_path, family, norm, "sop")
        output = load(AutoModelForPreTraining, folder)(**inputs, output_hidden_states=True)
        torch.testing.assert_close(output.hidden_states[-1], expected["last_hidden_state"], **TOLERANCE)
        torch.testing.assert_close(output.prediction_logits, expected["mlm_logits"], **TOLERANCE)
        torch.testing.assert_close(output.sop_logits, expected["sop_logits"], **TOLERANCE)

        output = load(AutoModelForQuestionAnswering, folder)(**inputs)
        torch.testing.assert_close(output.start_logits, expected["qa_start_logits"], **TOLERANCE)
        torch.testing.assert_close(output.end_logits, expected["qa_end_logits"], **TOLERANCE)

        output = load(AutoModelForMaskedLM, folder)(**inputs)
        torch.testing.assert_close(output.logits, expected["mlm_logits"], **TOLERANCE)

    def test_inverse_cloze_checkpoint(self, golden, tmp_path, family, norm):
        folder, expected, inputs = converted(golden, tmp_path, family, norm, "ict")
        retrieval = MixLMForRetrieval if family == "mixlm" else MixLMSwitchForRetrieval
        output = load(retrieval, folder)(**inputs, output_hidden_states=True)
        torch.testing.assert_close(output.hidden_states[-1], expected["last_hidden_state"], **TOLERANCE)
        torch.testing.assert_close(output.embeddings, expected["pooled"], **TOLERANCE)
        output = load(AutoModelForPreTraining, folder)(**inputs)
        torch.testing.assert_close(output.embeddings, expected["pooled"], **TOLERANCE)
