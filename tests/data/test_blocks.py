import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlm.data import blocks, columns
from mixlm.data.blocks import load_blocks, pack_sentences, write_blocks
from mixlm.data.columns import ArrowColumn, ArrowColumnWriter

MAX_TOKENS = 12
REPEATABLE = settings(derandomize=True, max_examples=60, deadline=None)

documents_of_lengths = st.lists(st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=12), min_size=1, max_size=8)


def offsets_and_borders(documents):
    lengths = [length for document in documents for length in document]
    offsets = np.cumsum([0, *lengths])
    return offsets, np.cumsum([0, *map(len, documents)])


@REPEATABLE
@given(documents=documents_of_lengths)
def test_blocks_cover_each_sentence_once_and_fit(documents):
    packed = pack_sentences(*offsets_and_borders(documents), MAX_TOKENS)
    assert packed.dtype == np.int32
    covered = [(document, sentence) for document, first, last, _ in packed.tolist() for sentence in range(first, last)]
    assert covered == [
        (number, sentence) for number, document in enumerate(documents) for sentence in range(len(document))
    ]
    for document, first, last, tokens in packed.tolist():
        assert first < last
        assert tokens == sum(documents[document][first:last]) <= MAX_TOKENS


@REPEATABLE
@given(documents=documents_of_lengths)
def test_blocks_are_full_and_a_last_single_sentence_is_avoided(documents):
    packed = pack_sentences(*offsets_and_borders(documents), MAX_TOKENS).tolist()
    for block, following in zip(packed, packed[1:], strict=False):
        document, first, last, tokens = block
        if following[0] != document:
            continue
        lengths = documents[document]
        is_last = following[2] == len(lengths)
        gave = is_last and following[2] - following[1] == 2
        assert gave or tokens + lengths[last] > MAX_TOKENS
        if is_last and following[2] - following[1] == 1:
            assert last - first < 3 or lengths[last - 1] + lengths[last] > MAX_TOKENS


def test_a_sentence_moves_to_a_lone_last_one():
    packed = pack_sentences(*offsets_and_borders([[4, 4, 4, 5], [12, 1]]), MAX_TOKENS)
    assert packed.tolist() == [[0, 0, 2, 8], [0, 2, 4, 9], [1, 0, 1, 12], [1, 1, 2, 1]]


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(columns, "ROWS_PER_BATCH", 16)
    monkeypatch.setattr(blocks, "SENTENCES_PER_PASS", 10)


def write_column(path, values, dtype=np.int64):
    with ArrowColumnWriter(path, np.dtype(dtype)) as column:
        for piece in np.array_split(np.asarray(values), 5):
            column.append(piece)
    return ArrowColumn(path)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("size", [1, 15, 16, 17, 32, 100])
def test_columns_read_across_record_batches(tmp_path, size):
    values = np.arange(size) * 3
    column = write_column(tmp_path / "values.arrow", values, np.uint16)
    assert len(column) == size
    for first in range(0, size, 7):
        for last in range(first + 1, size + 1, 5):
            found = column.read(first, last)
            assert found.dtype == np.uint16
            assert found.tolist() == values[first:last].tolist()
    with pytest.raises(ValueError, match="read-only"):
        column.read(0, 1)[0] = 1


@pytest.mark.usefixtures("small_batches")
def test_the_file_of_blocks_is_written_in_passes(tmp_path):
    random = np.random.default_rng(0)
    documents = [random.integers(1, MAX_TOKENS + 1, random.integers(1, 30)).tolist() for _ in range(40)]
    offsets, borders = offsets_and_borders(documents)
    write_blocks(
        tmp_path / "blocks.npy",
        write_column(tmp_path / "sentences.arrow", offsets),
        write_column(tmp_path / "documents.arrow", borders),
        MAX_TOKENS,
    )
    found = load_blocks(tmp_path / "blocks.npy", len(documents))
    assert (found == pack_sentences(offsets, borders, MAX_TOKENS)).all()
    assert not (tmp_path / "blocks.partial").exists()


def test_an_absent_or_damaged_file_of_blocks_is_noticed(tmp_path):
    file = tmp_path / "blocks.npy"
    assert load_blocks(file, 2) is None
    np.save(file, np.array([[0, 0, 2, 8], [1, 2, 4, 9]], dtype=np.int32))
    assert load_blocks(file, 2) is not None
    assert load_blocks(file, 3) is None
    content = file.read_bytes()
    for damaged in (content[:-5], b"", b"no array"):
        file.write_bytes(damaged)
        assert load_blocks(file, 2) is None
