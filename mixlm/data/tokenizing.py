"""Documents to token ids on disk, in a stream."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer

from ..progress import progress_bar
from .chunks import in_chunks
from .columns import ArrowColumnWriter
from .corpus import Document
from .cutting import text_backend

SENTENCES_PER_CHUNK = 1000  # that are tokenized at once: enough to keep all cores busy


def tokenize_documents(
    folder: Path, documents: Iterable[Document], backend: str, vocab_size: int, max_sentence_length: int
) -> dict[str, int]:
    """Tokenize documents into the columns of a store (`mixlm.data.store`).

    Args:
        folder: where tokens.arrow, sentences.arrow, documents.arrow and token_counts.npy are written.
        documents: read once, a chunk at a time.
        backend: a tokenizer of the `tokenizers` library, as JSON.
        vocab_size: number of ids.
        max_sentence_length: a sentence of more tokens is cut into several.

    Returns:
        num_documents, num_sentences, num_tokens and cut_sentences.
    """
    tokenizer = text_backend(Tokenizer.from_str(backend))
    token_counts = np.zeros(vocab_size, dtype=np.int64)
    num_documents = num_sentences = num_tokens = cut_sentences = 0
    last_document = None
    numbered_texts = ((number, text) for number, document in enumerate(documents) for text in document.sentences)
    with (
        ArrowColumnWriter(folder / "tokens.arrow", np.min_scalar_type(vocab_size - 1)) as tokens,
        ArrowColumnWriter(folder / "sentences.arrow", np.dtype(np.int64)) as sentence_offsets,
        ArrowColumnWriter(folder / "documents.arrow", np.dtype(np.int64)) as document_offsets,
        progress_bar(desc="tokenizing the corpus", unit=" sentences", unit_scale=True) as progress,
    ):
        for chunk, encodings in _encode_ahead(tokenizer, numbered_texts):
            sentences: list[list[int]] = []
            first_sentences = []  # of the documents that begin in this chunk
            for (document, text), encoding in zip(chunk, encodings, strict=True):
                ids = encoding.ids
                if not ids:  # nothing but characters that the tokenizer drops
                    continue
                if document != last_document:
                    first_sentences.append(num_sentences + len(sentences))
                    last_document = document
                if len(ids) <= max_sentence_length:
                    sentences.append(ids)
                else:
                    sentences.extend(_cut(tokenizer, text, max_sentence_length))
                    cut_sentences += 1
            lengths = np.fromiter(map(len, sentences), np.int64, len(sentences))
            ids = np.fromiter(chain.from_iterable(sentences), np.int64, int(lengths.sum()))
            tokens.append(ids)
            sentence_offsets.append(num_tokens + np.cumsum(lengths) - lengths)
            document_offsets.append(np.array(first_sentences, dtype=np.int64))
            token_counts += np.bincount(ids, minlength=vocab_size)
            num_documents += len(first_sentences)
            num_sentences += len(sentences)
            num_tokens += len(ids)
            progress.update(len(chunk))
        sentence_offsets.append(np.array([num_tokens]))
        document_offsets.append(np.array([num_sentences]))
    with open(folder / "token_counts.npy", "wb") as file:
        np.save(file, token_counts, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    return {
        "num_documents": num_documents,
        "num_sentences": num_sentences,
        "num_tokens": num_tokens,
        "cut_sentences": cut_sentences,
    }


def _encode_ahead(
    tokenizer: Tokenizer, numbered_texts: Iterator[tuple[int, str]]
) -> Iterator[tuple[list[tuple[int, str]], list[Encoding]]]:
    """One chunk after the other with its encodings, while the next one is already being encoded."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        ahead = None
        for chunk in in_chunks(numbered_texts, SENTENCES_PER_CHUNK):
            texts = [text for _, text in chunk]
            encodings = thread.submit(tokenizer.encode_batch_fast, texts, add_special_tokens=False)
            if ahead:
                yield ahead[0], ahead[1].result()
            ahead = chunk, encodings
        if ahead:
            yield ahead[0], ahead[1].result()


def _cut(tokenizer: Tokenizer, text: str, longest: int) -> list[list[int]]:
    """Cut a sentence into pieces of at most `longest` tokens, between words unless a single word is longer."""
    encoding = tokenizer.encode(text, add_special_tokens=False)  # the fast encoding of many does not tell the words
    ids, word_ids = encoding.ids, encoding.word_ids
    pieces = []
    start = 0
    while len(ids) - start > longest:
        end = start + longest
        while end > start and word_ids[end] == word_ids[end - 1]:
            end -= 1
        end = end if end > start else start + longest
        pieces.append(ids[start:end])
        start = end
    return [*pieces, ids[start:]]
