"""Tiny models, and Python processes in which this package does not exist: what the tests of remote code share."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import mixlm

REPOSITORY = Path(mixlm.__file__).parent.parent
TEXTS = ["서울 은 한국 의 수도 이다 .", "서울"]
WORDS = ["서울", "은", "한국", "의", "수도", "이다", "##다", "서", "울", "."]

# Auto class -> model class, the heads of a family.
HEADS = {
    "mixlm": {
        "AutoModel": mixlm.MixLMModel,
        "AutoModelForPreTraining": mixlm.MixLMForPreTraining,
        "AutoModelForMaskedLM": mixlm.MixLMForMaskedLM,
        "AutoModelForQuestionAnswering": mixlm.MixLMForQuestionAnswering,
        "AutoModelForTextEncoding": mixlm.MixLMForRetrieval,
    },
    "mixlm_switch": {
        "AutoModel": mixlm.MixLMSwitchModel,
        "AutoModelForPreTraining": mixlm.MixLMSwitchForPreTraining,
        "AutoModelForMaskedLM": mixlm.MixLMSwitchForMaskedLM,
        "AutoModelForQuestionAnswering": mixlm.MixLMSwitchForQuestionAnswering,
        "AutoModelForTextEncoding": mixlm.MixLMSwitchForRetrieval,
    },
}

# Runs before every script of `run_without_package`: even an installed package must not be found.
WITHOUT_PACKAGE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mixlm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
try:
    import mixlm
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("mixlm can be imported here; this test would prove nothing")
"""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of a few words; token_type_ids are among what it emits."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(
        models.WordPiece({word: index for index, word in enumerate(special + WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=32,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def tiny_model(model_class: type, **fields) -> torch.nn.Module:
    """A model of two small layers with a vocabulary for `tiny_tokenizer`, in evaluation mode."""
    torch.manual_seed(0)
    small = {
        "vocab_size": len(WORDS) + 5,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "n_experts": 2,
        "ff_dim": 32,
        "max_position_embeddings": 32,
        "initializer_range": 0.5,
    }
    config = model_class.config_class(**{**small, **fields})
    return model_class(config).eval()


def tiny_inputs() -> dict[str, torch.Tensor]:
    """`TEXTS` as a batch; the second is padded."""
    return dict(tiny_tokenizer()(TEXTS, padding=True, return_tensors="pt"))


def tensors_of(output) -> dict[str, torch.Tensor]:
    """The tensors of a model output by name."""
    return {name: value.detach().contiguous() for name, value in output.items() if torch.is_tensor(value)}


def run_with_package(script: str, folder: Path, **environment: str) -> str:
    """Run a script as a user of this package does; see `run_without_package`."""
    return _run(["-c", script], folder, {"PYTHONPATH": str(REPOSITORY), **environment})


def run_without_package(script: str, folder: Path, **environment: str) -> str:
    """Run a script in `folder`, in a process that cannot import this package. Its caches are in `folder` too.

    Returns the standard output; an exit status other than 0 fails the test with the standard error.
    """
    return _run(["-I", "-c", WITHOUT_PACKAGE + script], folder, environment)


def _run(arguments: list[str], folder: Path, environment: dict[str, str]) -> str:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "HF_", "TRANSFORMERS_", "HUGGING_FACE_", "COV_"))
    }
    environment = {
        **inherited,
        "HF_HOME": str(folder / "hf_home"),
        "HF_MODULES_CACHE": str(folder / "hf_modules"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"the process failed:\n{done.stderr[-6000:]}"
    return done.stdout
