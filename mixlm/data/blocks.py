"""Blocks: consecutive sentences of one document, packed up to a number of tokens."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .columns import ArrowColumn

SENTENCES_PER_PASS = 1 << 18  # which bounds the memory


def load_blocks(path: Path, num_documents: int) -> np.ndarray | None:
    """The blocks in a file, mapped into memory; None where the file is absent, or damaged."""
    try:
        blocks = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, EOFError, ValueError):
        return None
    is_whole = blocks.ndim == 2 and len(blocks) > 0 and blocks[-1, 0] == num_documents - 1
    return blocks if is_whole else None


def write_blocks(path: Path, sentence_offsets: ArrowColumn, document_offsets: ArrowColumn, max_tokens: int) -> None:
    """Pack all documents; the file appears when it is whole."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.int32)), "fortran_order": False}
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        # The header has room for the number of rows to grow; it is written again when that is known.
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (0, 4)})
        rows = 0
        for blocks in _pack_all(sentence_offsets, document_offsets, max_tokens):
            file.write(blocks.tobytes())
            rows += len(blocks)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (rows, 4)})
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def pack_sentences(offsets: np.ndarray, borders: np.ndarray, max_tokens: int) -> np.ndarray:
    """Pack the sentences of some documents greedily.

    A document's last block takes a sentence from the one before where it would else be a single sentence, there is
    room, and the other one keeps at least two.

    Args:
        offsets: first token of each sentence, and the end of the last one, [sentences + 1].
        borders: first sentence of each document, and the number of sentences, [documents + 1].
        max_tokens: most tokens of a block; no sentence is longer.

    Returns:
        int32 [blocks, 4]: document, first sentence, last sentence exclusive (both counted in the document), tokens.
    """
    document_of = np.repeat(np.arange(len(borders) - 1), np.diff(borders))
    document_end = borders[1:][document_of]
    # Where a block would end that starts at a sentence, for every sentence; the chain keeps blocks that follow each
    # other.
    block_end = np.minimum(np.searchsorted(offsets, offsets[:-1] + max_tokens, side="right") - 1, document_end)
    next_start = block_end.tolist()
    chain = []
    sentence = 0
    while sentence < len(next_start):
        chain.append(sentence)
        sentence = next_start[sentence]
    starts = np.array(chain, dtype=np.int64)
    ends = block_end[starts]

    sizes = ends - starts
    documents = document_of[starts]
    gives = np.flatnonzero(
        (sizes[1:] == 1)
        & (sizes[:-1] >= 3)
        & (documents[1:] == documents[:-1])
        & (ends[1:] == document_end[starts[1:]])
        & (offsets[ends[1:]] - offsets[starts[1:] - 1] <= max_tokens)
    )
    ends[gives] -= 1
    starts[gives + 1] -= 1

    first_of_document = borders[documents]
    tokens = offsets[ends] - offsets[starts]
    return np.stack([documents, starts - first_of_document, ends - first_of_document, tokens], axis=1).astype(np.int32)


def _pack_all(sentence_offsets: ArrowColumn, document_offsets: ArrowColumn, max_tokens: int) -> Iterator[np.ndarray]:
    """The blocks of all documents, some documents at a time."""
    document, num_documents = 0, len(document_offsets) - 1
    while document < num_documents:
        borders = document_offsets.read(document, min(document + SENTENCES_PER_PASS, num_documents) + 1)
        within = int(np.searchsorted(borders, borders[0] + SENTENCES_PER_PASS, side="right")) - 1
        borders = borders[: max(1, within) + 1]
        offsets = sentence_offsets.read(int(borders[0]), int(borders[-1]) + 1)
        blocks = pack_sentences(offsets, borders - borders[0], max_tokens)
        blocks[:, 0] += document
        yield blocks
        document += len(borders) - 1
