"""Texts to vectors: what `run_ict.py` leaves, and what indexes are made with."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForTextEncoding, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from .configuration import MixLMConfig, MixLMSwitchConfig
from .data.batching import evaluation_batches
from .data.passages import Passage
from .data.retrieval import EncodedTexts, RetrievalTokenizer
from .errors import UserError, one_line
from .tokenization import load_tokenizer

ENCODER_FILE = "encoder.json"
MODEL_TYPES = (MixLMConfig.model_type, MixLMSwitchConfig.model_type)


@dataclass(frozen=True)
class Encoding:
    """How texts become token ids: what an encoder needs to know beside the model.

    Args:
        max_query_length, max_passage_length: see `RetrievalTokenizer`.
        null_passage: whether the passage without text was trained as what unanswerable questions belong to.
    """

    max_query_length: int = 64
    max_passage_length: int = 256
    null_passage: bool = False

    def tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> RetrievalTokenizer:
        """What makes token ids of queries and passages."""
        return RetrievalTokenizer(tokenizer, self.max_query_length, self.max_passage_length)

    def save(self, folder: Path) -> None:
        """Write it beside the model, for `MixLMEncoder`."""
        (folder / ENCODER_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Encoding | None":
        """What `save` has written, if there is anything.

        Raises:
            UserError: it is something else.
        """
        file = folder / ENCODER_FILE
        if not file.is_file():
            return None
        try:
            return cls(**json.loads(file.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file}: is not what run_ict.py writes: {one_line(error)}") from error


@torch.no_grad()
def vectors_by_number(
    model: Callable[..., Any],
    device: torch.device,
    texts: EncodedTexts,
    rows: int,
    pad_token_id: int,
    are_passages: bool,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[tuple[int, np.ndarray]]:
    """The number and the vector [hidden], float32, of each text of a rank.

    Args:
        model: a ForRetrieval model or its engine, in evaluation mode.
        device: where it is.
        texts: of all ranks; those of about the same length share a batch.
        rows: of a batch.
        pad_token_id: the padding token.
        are_passages: of passages, or else of queries.
        rank, ranks: this process and how many there are.
    """
    prefix, output = ("context_", "context_embeddings") if are_passages else ("", "embeddings")
    batches = evaluation_batches(texts, rows, pad_token_id, rank, ranks)
    total = -(-len(texts) // (rows * ranks))
    for batch, counts in tqdm(batches, desc="encoding", total=total, leave=False, disable=rank > 0, delay=2):
        inputs = {prefix + name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        outputs = getattr(model(**inputs), output)
        if counts:
            yield from zip(batch["number"].tolist(), outputs.float().cpu().numpy(), strict=True)


def in_order(vectors: Iterable[tuple[int, np.ndarray]]) -> np.ndarray:
    """What `vectors_by_number` has found on all ranks, by number: [texts, hidden]."""
    return np.stack([vector for _, vector in sorted(vectors, key=lambda numbered: numbered[0])])


def load_for_retrieval(name_or_path: str, **fields: Any) -> tuple[PreTrainedModel, list[str]]:
    """A model for retrieval, and the names of its weights that are new.

    A tower for contexts that is not there yet begins as the tower of the queries.

    Args:
        name_or_path: a folder or Hub name, of any head.
        fields: of the configuration, to be changed.

    Raises:
        UserError: it cannot be loaded, is of another library, or weights of its encoder are missing.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # of a new pooler its user hears by what is returned
    try:
        config = AutoConfig.from_pretrained(name_or_path, **fields)
        if config.model_type not in MODEL_TYPES:
            raise UserError(f"{name_or_path}: is of type {config.model_type}; give one of {' or '.join(MODEL_TYPES)}")
        model, report = AutoModelForTextEncoding.from_pretrained(name_or_path, config=config, output_loading_info=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{name_or_path}: cannot be loaded: {one_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(report["missing_keys"])
    if lacking := [name for name in missing if name.startswith("encoder.")]:
        raise UserError(f"{name_or_path}: lacks {len(lacking)} weights of the encoder, such as {lacking[0]}")
    if any(name.startswith("context_encoder.") for name in missing):
        model.context_encoder.load_state_dict(model.encoder.state_dict())
    return model, [name for name in missing if not name.startswith("context_encoder.")]


class MixLMEncoder:
    """Turns queries and passages into vectors whose inner products say how well they belong together.

    Args:
        model: for retrieval; it is put into evaluation mode.
        tokenizer: its tokenizer.
        encoding: how texts become token ids.
        batch_size: texts that are encoded at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        encoding: Encoding | None = None,
        batch_size: int = 64,
    ):
        self.model, self.batch_size = model.eval(), batch_size
        self.encoding = encoding or Encoding()
        self.tokenizer = self.encoding.tokenizer(tokenizer)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, device: str | torch.device | None = None, batch_size: int = 64
    ) -> "MixLMEncoder":
        """The encoder in a folder, or on the Hub.

        Args:
            name_or_path: what `run_ict.py` has written, or a pretrained model of any head.
            device: None is a GPU where there is one.
            batch_size: texts that are encoded at once.

        Raises:
            UserError: it cannot be loaded, or is too short for its texts.
        """
        name = str(name_or_path)
        model, _ = load_for_retrieval(name)
        encoding = Encoding.load(Path(name)) or Encoding()
        require_room(model, encoding, name)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device), load_tokenizer(name), encoding, batch_size)

    def encode_queries(self, queries: Sequence[str]) -> np.ndarray:
        """Vectors [queries, hidden], float32."""
        return self._encode(self.tokenizer.queries(queries), are_passages=False)

    def encode_passages(self, passages: Sequence[Passage]) -> np.ndarray:
        """Vectors [passages, hidden], float32."""
        return self._encode(self.tokenizer.passages(passages), are_passages=True)

    def encode_empty_passage(self) -> np.ndarray:
        """The vector [hidden] of the passage without text: a query that is nearer to it has no answer."""
        return self._encode([self.tokenizer.empty_passage], are_passages=True)[0]

    def fingerprint(self) -> dict[str, Any]:
        """What the vectors depend on: hashes of weights and tokenizer, and settings."""
        weights = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.model.state_dict().items()):
            weights.update(name.encode())
            weights.update(tensor.detach().float().cpu().numpy().tobytes())
        words = hashlib.blake2b(self.tokenizer.backend.to_str().encode(), digest_size=16)
        names = ("pooler", "normalize_embeddings", "two_towers")
        return {
            "weights": weights.hexdigest(),
            "tokenizer": words.hexdigest(),
            **{name: getattr(self.model.config, name) for name in names},
            **asdict(self.encoding),
        }

    def _encode(self, texts: list[np.ndarray], are_passages: bool) -> np.ndarray:
        if not texts:
            return np.empty((0, self.model.config.hidden_size), dtype=np.float32)
        pad_token_id = self.tokenizer.pad_token_id
        return in_order(
            vectors_by_number(
                self.model, self.model.device, EncodedTexts(texts), self.batch_size, pad_token_id, are_passages
            )
        )


def require_room(model: PreTrainedModel, encoding: Encoding, name: str) -> None:
    """Raise UserError unless the model called `name` takes texts as long as `encoding` lets them be."""
    longest = model.config.max_position_embeddings
    for field in ("max_query_length", "max_passage_length"):
        if getattr(encoding, field) > longest:
            raise UserError(
                f"--{field}={getattr(encoding, field)}: {name} takes at most {longest} tokens "
                "(max_position_embeddings)"
            )
