"""What the tests of learning studies share."""

import json
from pathlib import Path

import study

SAMPLE = Path(__file__).parents[2] / "mixlm" / "sample"
LINE = {"name": "a", "model": "mixlm", "steps": 10, "seeds": [1, 2]}
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}
TINY = {"hidden_size": 32, "ff_dim": 32, "num_hidden_layers": 1}
OF = {"table": "kept", "name": "a"}
TASK = {"name": "reads", "model": "mixlm", "task": "reading", "of": OF, "minutes": 1, "seeds": [1, 2]}


class Tokenizer:
    pad_token_id, cls_token_id, sep_token_id = 0, 2, 3

    def __len__(self):
        return 60


def table(folder: Path, *lines) -> Path:
    file = folder / "table.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return file


def kept_models(folder: Path, monkeypatch, **changed) -> None:
    """Let there be a table `kept` with a line `a`."""
    (folder / "kept.jsonl").write_text(json.dumps({**LINE, "keep_model": True, **changed}), "utf-8")
    monkeypatch.setattr(study, "TABLES", folder)
