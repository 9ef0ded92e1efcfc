import numpy as np
import pytest

from mixlm.data.batching import LengthBucketedBatches, training_batches
from mixlm.data.examples import InverseClozeExamples, SentenceOrderExamples
from mixlm.data.masking import TokenMasker
from mixlm.data.retrieval import ClozePairs

VOCAB_SIZE = 5000
PAD, UNK, CLS, SEP, MASK = SPECIAL_IDS = range(5)
MAX_SEQ_LENGTH = 40


class ListedCorpus:
    """A corpus of one document. No id occurs twice, so that every token tells where it is from."""

    def __init__(self, lengths):
        ids = np.arange(5, 5 + sum(lengths), dtype=np.uint16)
        self.all_sentences = np.split(ids, np.cumsum(lengths)[:-1])

    def sentences(self, document, first, last):
        assert document == 0
        return self.all_sentences[first:last]

    @property
    def longest_sentence_length(self):
        return max(map(len, self.all_sentences))


@pytest.fixture
def corpus():
    return ListedCorpus([5, 8, 3, 12, 30, 9, 9, 9, 1, 2])


BLOCKS = np.array([[0, 0, 4, 28], [0, 4, 5, 30], [0, 5, 8, 27], [0, 8, 10, 3]], dtype=np.int32)


def make(examples_class, corpus, blocks=BLOCKS, seed=1, **options):
    masker = TokenMasker(VOCAB_SIZE, MASK, SPECIAL_IDS, np.ones(VOCAB_SIZE, dtype=bool))
    return examples_class(corpus, blocks, masker, CLS, SEP, MAX_SEQ_LENGTH, seed, **options)


def unmasked(ids, labels):
    return np.where(labels != -100, labels, ids).tolist()


def tokens_of(sentences):
    return np.concatenate(sentences).tolist()


def same(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[field], second[field]) for field in first)


def test_sentence_order_segments_join_to_their_block(corpus):
    examples = make(SentenceOrderExamples, corpus)
    assert len(examples) == 4
    borders = set()
    for epoch in range(200):
        example = examples[epoch, 0]
        ids = unmasked(example["input_ids"], example["labels"])
        assert len(ids) == examples.lengths[0] == 31
        assert ids[0] == CLS and ids[-1] == SEP and ids.count(SEP) == 2
        middle = ids.index(SEP)
        first, second = ids[1:middle], ids[middle + 1 : -1]
        assert example["token_type_ids"].tolist() == [0] * (middle + 1) + [1] * (len(ids) - middle - 1)
        if example["sentence_order_label"] == 1:
            first, second = second, first
        assert first + second == tokens_of(corpus.all_sentences[:4])
        borders.add(len(first))
    assert borders == {5, 13, 16}  # every border between sentences, and nothing else


def test_segments_are_swapped_half_of_the_time(corpus):
    examples = make(SentenceOrderExamples, corpus)
    labels = [examples[epoch, 2]["sentence_order_label"] for epoch in range(2000)]
    assert set(labels) == {0, 1}
    assert np.mean(labels) == pytest.approx(0.5, abs=0.05)


def test_a_block_of_one_sentence_is_for_masked_language_modelling_alone(corpus):
    examples = make(SentenceOrderExamples, corpus)
    example = examples[0, 1]
    assert example["sentence_order_label"] == -100
    assert unmasked(example["input_ids"], example["labels"]) == [CLS, *corpus.all_sentences[4], SEP]
    assert not example["token_type_ids"].any()
    assert examples.lengths.tolist() == [31, 32, 30, 6]
    assert (example["labels"] != -100).any()


def test_inverse_cloze_leaves_out_blocks_of_one_sentence(corpus):
    examples = make(InverseClozeExamples, corpus)
    assert len(examples) == len(examples.lengths) == len(BLOCKS) - 1
    assert examples.lengths.tolist() == [30, 29, 5]


def test_a_removed_query_leaves_no_trace_in_its_context(corpus):
    examples = make(InverseClozeExamples, corpus)
    kept = 0
    queries = set()
    for epoch in range(2000):
        example = examples[epoch, 0]
        query = unmasked(example["input_ids"], example["labels"])
        context = unmasked(example["context_input_ids"], example["context_labels"])
        assert (query[0], query[-1], context[0], context[-1]) == (CLS, SEP, CLS, SEP)
        sentences = [sentence.tolist() for sentence in corpus.all_sentences[:4]]
        place = sentences.index(query[1:-1])
        queries.add(place)
        if context[1:-1] == tokens_of(sentences):
            kept += 1
        else:
            del sentences[place]
            assert context[1:-1] == tokens_of(sentences)
            assert not set(query[1:-1]) & set(context)
            assert not set(query[1:-1]) & set(example["context_labels"].tolist())
    assert queries == {0, 1, 2, 3}
    assert kept / 2000 == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_the_query_is_always_or_never_removed(corpus, probability):
    examples = make(InverseClozeExamples, corpus, remove_query_probability=probability)
    lengths = {len(examples[epoch, 1]["context_input_ids"]) for epoch in range(50)}
    assert lengths == ({20} if probability else {29})


def test_both_query_and_context_are_masked(corpus):
    example = make(InverseClozeExamples, corpus)[0, 0]
    assert (example["labels"] != -100).any() and (example["context_labels"] != -100).any()


@pytest.mark.parametrize("examples_class", [SentenceOrderExamples, InverseClozeExamples])
def test_an_example_depends_on_seed_epoch_and_index_alone(corpus, examples_class):
    one, other = make(examples_class, corpus), make(examples_class, corpus)
    list(map(one.__getitem__, [(0, 2), (1, 1), (5, 0)]))
    assert same(one[3, 0], other[3, 0])
    assert not same(one[3, 0], one[4, 0])
    assert not same(one[3, 0], make(examples_class, corpus, seed=2)[3, 0])
    twin = make(examples_class, corpus, blocks=BLOCKS[[0, 0]])
    assert not same(twin[3, 0], twin[3, 1])


@pytest.mark.parametrize("examples_class", [SentenceOrderExamples, InverseClozeExamples])
def test_workers_make_the_same_batches(corpus, examples_class):
    def first_steps(num_workers):
        examples = make(examples_class, corpus, blocks=BLOCKS[np.arange(60) % 4])
        order = LengthBucketedBatches(examples.lengths, seed=1, rows_per_step=6, micro_batches=2)
        stream = training_batches(examples, order, None, PAD, num_workers)
        return [batch for _ in range(12) for batch in next(stream)[1]]

    for alone, helped in zip(first_steps(0), first_steps(2), strict=True):
        assert same(alone, helped)


@pytest.mark.parametrize("examples_class", [SentenceOrderExamples, InverseClozeExamples])
def test_examples_are_never_too_long(corpus, examples_class):
    too_long = np.array([[0, 4, 6, MAX_SEQ_LENGTH - 1]])
    with pytest.raises(ValueError, match=rf"corpus.blocks\({MAX_SEQ_LENGTH - examples_class.special_tokens}\)"):
        make(examples_class, corpus, blocks=too_long)


def test_a_limit_keeps_examples_from_the_first_document_to_the_last(corpus):
    examples = make(SentenceOrderExamples, corpus)
    every = examples.blocks.tolist()
    examples.limit(len(every))
    assert examples.blocks.tolist() == every
    examples.limit(2)
    assert examples.blocks.tolist() == [every[0], every[-1]]


def test_no_batch_of_queries_and_contexts_is_longer_than_the_longest_example(corpus):
    """With a query from one block and a context, which keeps its own, from another."""
    examples = make(InverseClozeExamples, corpus, remove_query_probability=0.5)
    found = [examples[epoch, index] for epoch in range(200) for index in range(len(examples))]
    longest = examples.longest()
    assert len(longest["context_input_ids"]) == max(len(example["context_input_ids"]) for example in found) == 30
    # The sentence of 30 tokens has a block of its own, and is nobody's query.
    assert max(len(example["input_ids"]) for example in found) == 14
    assert 14 <= len(longest["input_ids"]) <= 29
    assert [len(longest[name]) for name in ("labels", "context_labels")] == [len(longest["input_ids"]), 30]


def test_the_longest_pair_of_a_corpus_has_no_labels(corpus):
    pairs = ClozePairs(corpus, BLOCKS, CLS, SEP, MAX_SEQ_LENGTH, 1)
    assert pairs.longest().keys() == pairs[0, 0].keys() == {"input_ids", "context_input_ids"}
