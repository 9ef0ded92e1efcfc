"""A tokenized corpus on disk: built once, then mapped into memory.

A store is a folder under the cache directory, named after what it was made from (the content of the corpus files, the
tokenizer, the longest sentence). Its numbers lie in Arrow files, one column each:

    tokens.arrow           ids of all sentences, one after the other, without special tokens
    sentences.arrow        first token of each sentence, and at the end the number of tokens
    documents.arrow        first sentence of each document, and at the end the number of sentences
    token_counts.npy       how often each id occurs
    manifest.json          what it was made from, counts, and the size of each file; written last
    blocks_<tokens>.npy    added on demand

A store is whole or absent: it is written beside, flushed to the disk and renamed. Building takes the same memory
whatever the size of the corpus, opening the same time.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..files import cache_folder, names_of_remnants, whole_folder, write_json
from .batching import scramble
from .blocks import SENTENCES_PER_PASS, load_blocks, write_blocks
from .columns import ArrowColumn
from .corpus import (
    Document,
    corpus_files,
    dataset_fingerprint,
    dataset_name,
    documents_of_dataset,
    load_text_dataset,
    read_documents,
)
from .hashing import content_hashes, file_stamps, hash_json
from .tokenizing import tokenize_documents

if TYPE_CHECKING:
    from .corpus import AnyDataset

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2  # 2: text is composed to NFC


class TokenizedCorpus:
    """A store that is open for reading. It can be sent to other processes: they map the same files.

    Attributes:
        folder: where it lies.
        num_documents, num_sentences, num_tokens: its size; tokens are counted without special ones.
        cut_sentences: how many sentences were longer than the longest allowed, and were cut into several.
        max_sentence_length: the longest allowed, in tokens.
        token_counts: how often each id occurs, int64 [vocabulary].
        tokens, sentence_offsets, document_offsets: the columns described at the top of this module.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        self.num_documents: int = manifest["num_documents"]
        self.num_sentences: int = manifest["num_sentences"]
        self.num_tokens: int = manifest["num_tokens"]
        self.cut_sentences: int = manifest["cut_sentences"]
        self.max_sentence_length: int = manifest["max_sentence_length"]
        self.tokens = ArrowColumn(self.folder / "tokens.arrow")
        self.sentence_offsets = ArrowColumn(self.folder / "sentences.arrow")
        self.document_offsets = ArrowColumn(self.folder / "documents.arrow")
        self.token_counts = np.load(self.folder / "token_counts.npy", allow_pickle=False)
        found = (len(self.tokens), len(self.sentence_offsets) - 1, len(self.document_offsets) - 1)
        if found != (self.num_tokens, self.num_sentences, self.num_documents):
            raise ValueError(f"{self.folder}: the columns do not have the lengths that the manifest names")

    def __reduce__(self):
        return TokenizedCorpus, (self.folder,)

    def sentences(self, document: int, first: int, last: int) -> list[np.ndarray]:
        """Token ids of sentences `first` to `last`, exclusive, of a document: one read-only array each."""
        first_of_document = int(self.document_offsets.read(document, document + 1)[0])
        offsets = self.sentence_offsets.read(first_of_document + first, first_of_document + last + 1).tolist()
        tokens = self.tokens.read(offsets[0], offsets[-1])
        borders = [offset - offsets[0] for offset in offsets]
        return [tokens[start:end] for start, end in zip(borders, borders[1:], strict=False)]

    @cached_property
    def longest_sentence_length(self) -> int:
        """Tokens of the longest sentence there is, read in pieces."""
        longest = 0
        for first in range(0, self.num_sentences, SENTENCES_PER_PASS):
            last = min(first + SENTENCES_PER_PASS, self.num_sentences)
            longest = max(longest, int(np.diff(self.sentence_offsets.read(first, last + 1)).max()))
        return longest

    def held_out(self, fraction: float) -> np.ndarray:
        """Which documents are kept from training, bool [documents].

        It depends on the number of the document alone, not on a seed; at least one document is on each side.

        Args:
            fraction: share of the documents, between 0 and 1.

        Raises:
            UserError: the fraction is not between 0 and 1.
        """
        if not 0 < fraction < 1:
            raise UserError(f"held-out fraction {fraction}: must lie between 0 and 1, for example 0.01")
        place = scramble(np.arange(1, self.num_documents + 1, dtype=np.uint64))
        is_held_out = place < np.uint64(int(fraction * 2**64))
        is_held_out[np.argmin(place)] = True
        is_held_out[np.argmax(place)] = False
        return is_held_out

    def blocks(self, max_tokens: int) -> np.ndarray:
        """Consecutive sentences of a document, packed greedily up to `max_tokens`.

        A document's last block borrows a sentence from the one before where it would else be a single sentence and the
        other one has enough. The blocks are made once and then mapped into memory.

        Returns:
            int32 [blocks, 4]: document, first sentence, last sentence exclusive (both counted within the document),
            tokens. Each sentence of the corpus is in exactly one block.

        Raises:
            UserError: sentences can be longer than `max_tokens`, or the cache cannot be written.
        """
        if max_tokens < self.max_sentence_length:
            raise UserError(
                f"blocks of {max_tokens} tokens cannot hold sentences of up to {self.max_sentence_length} tokens; "
                f"open the corpus with max_sentence_length={max_tokens}"
            )
        path = self.folder / f"blocks_{max_tokens}.npy"
        blocks = load_blocks(path, self.num_documents)
        if blocks is None:
            with _cache_errors(self.folder.parent), FileLock(_lock_file(self.folder)):
                blocks = load_blocks(path, self.num_documents)  # another process may have written them in the meantime
                if blocks is None:
                    write_blocks(path, self.sentence_offsets, self.document_offsets, max_tokens)
                    blocks = load_blocks(path, self.num_documents)
        return blocks


def open_corpus(
    corpus_path: str | Path | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_sentence_length: int,
    cache_dir: str | Path | None = None,
    dataset: "str | Path | AnyDataset | None" = None,
    text_column: str = "text",
    config_name: str | None = None,
    streaming: bool = False,
) -> TokenizedCorpus:
    """The tokenized form of a corpus: from the cache or, where that does not have it, built now.

    Args:
        corpus_path: a corpus file or a folder of them (`mixlm.data.corpus.corpus_files`); None with `dataset`.
        tokenizer: with a backend of the `tokenizers` library.
        max_sentence_length: tokens of the longest sentence. A longer one is cut, between words where that is possible,
            into several, so that no text is lost. What is left of `max_seq_length` without the special tokens of an
            example (`SentenceOrderExamples.special_tokens`) is the largest value whose sentences fit into a block.
        cache_dir: default: environment variable MIXLM_CACHE, else ~/.cache/mixlm.
        dataset: read this instead of `corpus_path`: a name, or what `datasets` has loaded; a stream is read once.
        text_column, config_name, streaming: as `mixlm.data.corpus.load_text_dataset` has them.

    Raises:
        UserError: the corpus cannot be read or has fewer than two documents, the cache cannot be written, or
            `max_sentence_length` is below 1.
    """
    if max_sentence_length < 1:
        raise UserError(f"max_sentence_length {max_sentence_length}: must be at least 1; use a larger max_seq_length")
    cache = cache_folder(cache_dir)
    if dataset is not None:
        rows, name = load_text_dataset(dataset, text_column, config_name, streaming), dataset_name(dataset)
        source = {"name": name, "text_column": text_column, "content": dataset_fingerprint(rows)}

        def documents() -> Iterator[Document]:
            return documents_of_dataset(rows, name, text_column)
    else:
        stamps = file_stamps(corpus_files(corpus_path))
        with _cache_errors(cache):
            hashes = content_hashes(stamps, cache)
        source = {"name": str(corpus_path), "files": stamps, "content": hashes}

        def documents() -> Iterator[Document]:
            yield from read_documents(corpus_path)
            if file_stamps(corpus_files(corpus_path)) != stamps:
                raise UserError(f"{corpus_path}: files have changed while they were read; start again")

    return build_or_open(documents, source, tokenizer, cache, max_sentence_length)


def build_or_open(
    documents: Callable[[], Iterable[Document]],
    source: dict,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    max_sentence_length: int,
) -> TokenizedCorpus:
    """The store of some documents: from the cache, or built by the first of the processes that ask for it.

    Args:
        documents: starts to read them; called only where the store has to be built.
        source: where they come from, for the manifest: its "name" is shown in errors, its "content" (any JSON)
            identifies the text and is part of the store's name.
        tokenizer: with a backend of the `tokenizers` library.
        cache_dir: the store becomes a folder in it.
        max_sentence_length: in tokens (see `open_corpus`).

    Raises:
        UserError: there are fewer than two documents, or the cache cannot be written.
    """
    backend = _serialized_backend(tokenizer)
    made_from = {
        "format_version": FORMAT_VERSION,
        "content": source["content"],
        "tokenizer": hash_json([backend, sorted(tokenizer.all_special_ids)]),
        "max_sentence_length": max_sentence_length,
    }
    folder = cache_dir / f"corpus-{hash_json(made_from)}"
    corpus = _open_whole(folder)
    if corpus is not None:
        return corpus
    with _cache_errors(cache_dir), FileLock(_lock_file(folder)):
        os.listdir(cache_dir)  # a network's file system may remember that the folder is absent; this makes it look
        corpus = _open_whole(folder)  # another process may have built it in the meantime
        if corpus is None:
            _remove_leftovers(cache_dir)
            with whole_folder(folder) as partial:
                counts = tokenize_documents(partial, documents(), backend, len(tokenizer), max_sentence_length)
                if counts["num_documents"] < 2:
                    raise UserError(
                        f"{source['name']}: found {counts['num_documents']} document; pretraining needs at least two, "
                        "to hold one out; put a blank line between documents"
                    )
                _write_manifest(partial, {**made_from, "source": source, **counts})
            corpus = _open_whole(folder)
    return corpus


def _serialized_backend(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's backend as JSON, without what earlier calls may have left in it."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({**settings, "truncation": None, "padding": None}, sort_keys=True)


def _write_manifest(folder: Path, entries: dict) -> None:
    """Written last: a folder that has a manifest has everything else."""
    manifest = {
        **entries,
        "libraries": {name: version(name) for name in ("tokenizers", "transformers", "pyarrow", "numpy")},
        "file_sizes": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    }
    write_json(folder / "manifest.json", manifest)


def _open_whole(folder: Path) -> TokenizedCorpus | None:
    """The store, or None where it is absent or damaged."""
    if not folder.exists():
        return None
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, size in manifest["file_sizes"].items():
            found = (folder / name).stat().st_size
            if found != size:
                raise ValueError(f"{name} has {found} bytes instead of {size}")
        return TokenizedCorpus(folder)
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        logger.warning("%s: the tokenized corpus is damaged (%s); it is built again", folder, error)
        return None


@contextmanager
def _cache_errors(cache_dir: Path) -> Iterator[None]:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"{cache_dir}: the tokenized corpus cannot be kept there ({error}); set MIXLM_CACHE to a folder that "
            "you may write, with enough space"
        ) from error


def _remove_leftovers(cache_dir: Path) -> None:
    """Remove what interrupted builds of other stores have left: the folders whose lock nobody holds."""
    for pattern in names_of_remnants("corpus-*"):
        for leftover in cache_dir.glob(pattern):
            folder = leftover.with_name(leftover.stem.removeprefix("."))
            try:
                with FileLock(_lock_file(folder), timeout=0):
                    shutil.rmtree(leftover, ignore_errors=True)  # it may be finished, or gone, since it was found
            except Timeout:
                continue


def _lock_file(folder: Path) -> Path:
    return folder.with_suffix(".lock")
