"""A model for retrieval as a module of sentence-transformers.

This file is written into what `mixlm export sentence-transformers` makes and is loaded from there without the package,
no other file of which it imports.
"""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from sentence_transformers.base.modules import InputModule
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForTextEncoding, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast


class RetrievalEncoder(InputModule):
    """Texts to vectors, exactly as mixlm does it.

    With the task "query" (`encode_query`), texts are questions; with any other and with none (`encode_document`,
    `encode`), they are passages: a text, or a pair of its title and the text.

    Args:
        model: with `embeddings` of questions and `context_embeddings` of passages.
        tokenizer: its tokenizer.
        encoding: how texts become token ids; the content of encoder.json.
    """

    config_file_name = "encoder.json"
    forward_kwargs = {"task"}

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, encoding: dict[str, Any]):
        super().__init__()
        self.model, self.tokenizer, self.encoding = model, tokenizer, encoding
        # A copy: "[SEP]" in a text is text here, and lengths are seen to below.
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True

    @property
    def max_seq_length(self) -> int:
        """Most tokens of a passage; can be set, to at most what the model takes."""
        return self.encoding["max_passage_length"]

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        longest = self.model.config.max_position_embeddings
        if not 2 <= value <= longest:  # [CLS] and [SEP] at least
            raise ValueError(f"max_seq_length={value} must be from 2 to {longest}, which the model takes")
        self.encoding = {**self.encoding, "max_passage_length": value}

    def get_embedding_dimension(self) -> int:
        """Numbers in a vector."""
        return self.model.config.hidden_size

    def preprocess(
        self,
        inputs: Sequence[str | tuple[str, str] | Mapping[str, str]],
        prompt: str | None = None,
        task: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Texts as `input_ids` and `attention_mask`, [texts, longest].

        [CLS] text [SEP], or [CLS] title [SEP] text [SEP], composed to NFC; what is too long is cut at its end.

        Args:
            inputs: texts, (title, text), or what has a "text" and perhaps a "title".
            prompt: is put before each text.
            task: "query" for questions; all else is a passage.
        """
        longest = self.encoding["max_query_length" if task == "query" else "max_passage_length"]
        pairs = [_title_and_text(each) for each in inputs]
        titles = self._encode([title for title, _ in pairs])
        texts = self._encode([(prompt or "") + text for _, text in pairs])
        rows = [
            self._joined([title, text] if title else [text], longest)
            for title, text in zip(titles, texts, strict=True)
        ]
        ids = [torch.tensor(row) for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }

    def forward(self, features: dict[str, Any], task: str | None = None) -> dict[str, Any]:
        """Add `sentence_embedding` [texts, hidden] to what `preprocess` has returned."""
        prefix, output = ("", "embeddings") if task == "query" else ("context_", "context_embeddings")
        inputs = {prefix + name: features[name] for name in ("input_ids", "attention_mask")}
        return {**features, "sentence_embedding": self.model(**inputs)[output]}

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write what `load` reads."""
        self.model.save_pretrained(output_path)
        self.tokenizer.save_pretrained(output_path)
        self.save_config(output_path)

    def get_config_dict(self) -> dict[str, Any]:
        """The content of encoder.json."""
        return self.encoding

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> "RetrievalEncoder":
        """The module in a folder or on the Hub; arguments are those of `SentenceTransformer`."""
        place = {
            "subfolder": subfolder,
            "token": token,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        encoding = cls.load_config(model_name_or_path, cache_folder=cache_folder, **place)
        place |= {"cache_dir": cache_folder, "trust_remote_code": trust_remote_code}
        model = AutoModelForTextEncoding.from_pretrained(
            model_name_or_path, **place, **(config_kwargs or {}), **(model_kwargs or {})
        )
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **place, **(processor_kwargs or {}))
        return cls(model, tokenizer, encoding)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        composed = [unicodedata.normalize("NFC", text) for text in texts]
        return [encoding.ids for encoding in self.backend.encode_batch(composed, add_special_tokens=False)]

    def _joined(self, parts: list[list[int]], longest: int) -> list[int]:
        ids = [self.tokenizer.cls_token_id]
        for part in parts:
            ids += [*part, self.tokenizer.sep_token_id]
        return ids if len(ids) <= longest else [*ids[: longest - 1], self.tokenizer.sep_token_id]


def _title_and_text(given: Any) -> tuple[str, str]:
    if isinstance(given, str):
        return "", given
    if isinstance(given, Mapping):
        given = (given.get("title"), given.get("text"))
    match tuple(given) if isinstance(given, Iterable) else ():
        case (None | str() as title, str() as text):
            return title or "", text
    raise ValueError(f"{given!r:.60} is no text: give a str, (title, text), or a dict with 'text' and perhaps 'title'")
