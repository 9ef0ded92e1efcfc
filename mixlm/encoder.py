"""Texts to vectors: what `run_ict.py` leaves, and what indexes are made with."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import AutoModelForTextEncoding, PreTrainedModel, PreTrainedTokenizerFast

from .data.batching import evaluation_batches
from .data.passages import Passage
from .data.retrieval import EncodedTexts, RetrievalTokenizer
from .errors import UserError
from .loading import StoredSettings, hash_of_weights, load_model, own_config, require_room, require_vocabulary
from .progress import progress_bar
from .tokenization import load_tokenizer


@dataclass(frozen=True)
class Encoding(StoredSettings):
    """How texts become token ids: what an encoder needs to know beside the model.

    Args:
        max_query_length, max_passage_length: see `RetrievalTokenizer`.
        null_passage: whether the passage without text was trained as what unanswerable questions belong to.
    """

    file_name: ClassVar[str] = "encoder.json"
    written_by: ClassVar[str] = "run_ict.py"

    max_query_length: int = 64
    max_passage_length: int = 256
    null_passage: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Encoding":
        """For a model that was not trained by run_ict.py: as long as its positions allow, up to the defaults."""
        longest = model.config.max_position_embeddings
        return cls(min(cls.max_query_length, longest), min(cls.max_passage_length, longest))

    def require_room(self, model: PreTrainedModel, name: str) -> None:
        """Raise UserError unless the model called `name` takes such texts."""
        require_room(model, name, max_query_length=self.max_query_length, max_passage_length=self.max_passage_length)

    def tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> RetrievalTokenizer:
        """What makes token ids of queries and passages."""
        return RetrievalTokenizer(tokenizer, self.max_query_length, self.max_passage_length)


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
    for batch, counts in progress_bar(batches, desc="encoding", total=total, leave=False):
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
        UserError: it cannot be loaded, is of another library, or weights of its encoders are missing.
    """
    model, missing = load_model(AutoModelForTextEncoding, name_or_path, config=own_config(name_or_path, **fields))
    of_contexts = [name for name in missing if name.startswith("context_encoder.")]
    has_none_of_contexts = len(of_contexts) == len(model.encoder.state_dict())
    lacking = [name for name in missing if name.startswith("encoder.")]
    if lacking := lacking or ([] if has_none_of_contexts else of_contexts):
        raise UserError(f"{name_or_path}: lacks {len(lacking)} weights of the encoder, such as {lacking[0]}")
    if of_contexts:
        model.context_encoder.load_state_dict(model.encoder.state_dict())
    return model, [name for name in missing if name not in of_contexts]


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
        encoding = Encoding.load(name) or Encoding.of(model)
        encoding.require_room(model, name)
        tokenizer = load_tokenizer(name)
        require_vocabulary(model, name, tokenizer)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device), tokenizer, encoding, batch_size)

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
        """What the vectors depend on: hashes of weights and tokenizer, the normal form of texts, and settings."""
        words = hashlib.blake2b(self.tokenizer.backend.to_str().encode(), digest_size=16)
        names = ("pooler", "normalize_embeddings", "two_towers")
        return {
            "weights": hash_of_weights(self.model),
            "tokenizer": words.hexdigest(),
            "normal_form": self.tokenizer.normal_form,
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
