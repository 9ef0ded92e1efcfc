from hypothesis import given
from hypothesis import strategies as st

from mixlm.data.passages import Passage
from mixlm.retrieval import passages as module
from mixlm.retrieval.passages import StoredPassages, write_passages

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


@given(st.lists(st.builds(Passage, texts, texts, texts), min_size=1, max_size=9, unique_by=lambda passage: passage.id))
def test_what_is_written_is_read(tmp_path_factory, passages):
    file = tmp_path_factory.mktemp("passages") / "passages.arrow"
    with_small_batches = module._ROWS_PER_BATCH
    module._ROWS_PER_BATCH = 2
    try:
        count, _ = write_passages(file, iter(passages))
        stored = StoredPassages(file)
        assert count == len(stored) == len(passages)
        assert list(stored) == [stored[row] for row in range(count)] == passages
        assert [stored.id_of_row(row) for row in range(count)] == [passage.id for passage in passages]
    finally:
        module._ROWS_PER_BATCH = with_small_batches


def test_the_hash_is_that_of_the_content_and_its_order(tmp_path):
    one, other = Passage("a", "b", "c"), Passage("ab", "", "c")
    hashes = {
        write_passages(tmp_path / "p", passages)[1]
        for passages in ([one], [other], [one, other], [other, one], [one, other])
    }
    assert len(hashes) == 4
