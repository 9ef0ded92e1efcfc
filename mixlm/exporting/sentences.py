"""A model for retrieval as a folder that sentence-transformers loads."""

import shutil
from pathlib import Path

from ..encoder import MixLMEncoder
from ..files import new_folder, write_json
from ..tokenization import load_tokenizer, save_tokenizer

MODULE_FILE = Path(__file__).with_name("sentence_encoder.py")
MODULE_CLASS = "RetrievalEncoder"


def export_sentence_transformers(name_or_path: str | Path, out: Path) -> MixLMEncoder:
    """Write a folder for `SentenceTransformer(out, trust_remote_code=True)`, which needs no mixlm.

    It is still what mixlm itself loads: the model with its code, the tokenizer and encoder.json. Beside them are the
    module of sentence-transformers that makes vectors of texts, and the two files that name it.

    Args:
        name_or_path: what `run_ict.py` has written, or a pretrained model of any head.
        out: the new folder.

    Returns:
        What was exported.

    Raises:
        UserError: the model cannot be loaded, or `out` cannot be written or is not empty.
    """
    encoder = MixLMEncoder.from_pretrained(name_or_path, device="cpu")
    with new_folder(out) as folder:
        encoder.model.save_pretrained(folder)
        save_tokenizer(load_tokenizer(name_or_path), folder)
        encoder.encoding.save(folder)
        shutil.copyfile(MODULE_FILE, folder / MODULE_FILE.name)
        module = {"idx": 0, "name": "0", "path": "", "type": f"{MODULE_FILE.stem}.{MODULE_CLASS}"}
        write_json(folder / "modules.json", [module])
        settings = {
            "model_type": "SentenceTransformer",
            "similarity_fn_name": "dot",  # of vectors of length 1, that is the cosine
            "prompts": {"query": "", "document": ""},
            "requirements": {"sentence-transformers": ">=6"},
        }
        write_json(folder / "config_sentence_transformers.json", settings)
    return encoder
