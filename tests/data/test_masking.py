import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlm.data.masking import SPANS_OF_UNIT, TokenMasker
from mixlm.errors import UserError

VOCAB_SIZE = 60
PAD, UNK, CLS, SEP, MASK = SPECIAL_IDS = range(5)
WORD_START = np.arange(VOCAB_SIZE) % 2 == 1  # odd ids begin a word, even ones continue it
WORD_START[list(SPECIAL_IDS)] = True

UNITS = sorted(SPANS_OF_UNIT)
REPEATABLE = settings(derandomize=True, max_examples=60, deadline=None)


def make_masker(unit="ngram", **options):
    return TokenMasker(VOCAB_SIZE, MASK, SPECIAL_IDS, WORD_START, unit=unit, **options)


def whole_words(ids):
    """Sets of places, by the plain definition."""
    words, current = [], None
    for place, token in enumerate(ids):
        if token in SPECIAL_IDS:
            current = None
        elif current is None or WORD_START[token]:
            current = [place]
            words.append(current)
        else:
            current.append(place)
    return words


sequences = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=90).map(np.array)


@REPEATABLE
@given(ids=sequences, unit=st.sampled_from(UNITS), probability=st.floats(0.01, 0.9), seed=st.integers(0, 1000))
def test_masking_can_be_undone_and_spares_special_tokens(ids, unit, probability, seed):
    before = ids.copy()
    masked, labels = make_masker(unit, probability=probability)(ids, np.random.default_rng(seed))
    chosen = labels != -100
    assert masked.dtype == labels.dtype == np.int64
    assert (ids == before).all()
    assert (np.where(chosen, labels, masked) == ids).all()
    assert not chosen[np.isin(ids, SPECIAL_IDS)].any()
    assert not np.isin(masked[chosen], [PAD, UNK, CLS, SEP]).any()


@REPEATABLE
@given(ids=sequences, unit=st.sampled_from(UNITS), probability=st.floats(0.01, 0.9), seed=st.integers(0, 1000))
def test_the_number_of_chosen_tokens_is_never_too_large(ids, unit, probability, seed):
    chosen = make_masker(unit, probability=probability)(ids, np.random.default_rng(seed))[1] != -100
    words = whole_words(ids)
    tokens = sum(map(len, words))
    if not tokens:
        assert not chosen.any()
        return
    target = max(1, round(probability * tokens))
    shortest = min(map(len, words))
    assert 1 <= chosen.sum() <= max(target, shortest)
    if unit == "subword":
        assert chosen.sum() == target


@REPEATABLE
@given(ids=sequences, unit=st.sampled_from(["word", "ngram"]), seed=st.integers(0, 1000))
def test_words_stay_whole(ids, unit, seed):
    chosen = make_masker(unit)(ids, np.random.default_rng(seed))[1] != -100
    for word in whole_words(ids):
        assert len(set(chosen[word])) == 1


def test_the_draws_depend_on_the_generator_alone():
    ids = np.random.default_rng(0).integers(5, VOCAB_SIZE, 100)
    masker = make_masker()
    first = masker(ids, np.random.default_rng(7))
    masker(ids, np.random.default_rng(8))
    again = masker(ids, np.random.default_rng(7))
    other = masker(ids, np.random.default_rng(8))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first[1] != other[1]).any()


@pytest.mark.parametrize("unit", UNITS)
def test_rates(unit):
    random = np.random.default_rng(0)
    masker = make_masker(unit)
    chosen = tokens = masks = kept = 0
    for _ in range(400):
        ids = random.integers(5, VOCAB_SIZE, 128)
        masked, labels = masker(ids, random)
        tokens += len(ids)
        chosen += (labels >= 0).sum()
        masks += (masked[labels >= 0] == MASK).sum()
        kept += (masked == labels).sum()
    assert chosen / tokens == pytest.approx(19 / 128, rel=0.01)  # round(0.15 * 128) = 19
    deviation = 4 * np.sqrt(0.25 / chosen)
    assert masks / chosen == pytest.approx(0.8, abs=deviation)
    assert kept / chosen == pytest.approx(0.1 + 0.1 / (VOCAB_SIZE - 5), abs=deviation)


def test_every_token_is_chosen_equally_often_as_single_tokens():
    random = np.random.default_rng(0)
    masker = make_masker("subword")
    ids = random.integers(5, VOCAB_SIZE, 40)
    counts = sum((masker(ids, random)[1] >= 0).astype(int) for _ in range(4000))
    assert np.abs(counts / 4000 - 6 / 40).max() < 5 * np.sqrt(0.15 * 0.85 / 4000)


@pytest.mark.parametrize("unit", UNITS)
def test_every_part_of_a_text_is_chosen_equally_often(unit):
    random = np.random.default_rng(0)
    masker = make_masker(unit)
    counts = sum((masker(random.integers(5, VOCAB_SIZE, 80), random)[1] >= 0).astype(int) for _ in range(400))
    assert counts.reshape(4, 20).sum(axis=1) / counts.sum() == pytest.approx(np.full(4, 1 / 4), abs=0.03)


def test_ngram_lengths_are_in_proportion_to_one_over_n():
    ids = np.full(5000, 5)  # words of one token
    words = make_masker()._words(ids)
    spans = list(SPANS_OF_UNIT["ngram"](words, np.random.default_rng(0)))
    counts = np.bincount([last - first for first, last in spans], minlength=4)[1:] / len(spans)
    assert counts == pytest.approx(np.array([6, 3, 2]) / 11, abs=0.03)


def test_ngrams_do_not_cross_special_tokens():
    ids = np.array([CLS, 5, 6, 7, SEP, 9, 10, SEP])
    words = make_masker()._words(ids)
    for seed in range(50):
        for first, last in SPANS_OF_UNIT["ngram"](words, np.random.default_rng(seed)):
            assert not np.isin(ids[first:last], SPECIAL_IDS).any()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("probability", [0.15, 0.4])
@pytest.mark.parametrize("length", [512, 535, 1024, 4096])
def test_the_share_is_the_same_at_every_length(unit, probability, length):
    ids = np.full(length, 5)  # words of one token, so that no share is out of reach
    chosen = make_masker(unit, probability=probability)(ids, np.random.default_rng(0))[1] >= 0
    assert chosen.sum() == round(probability * length)


def test_a_word_longer_than_the_share_is_still_masked_but_not_a_block_of_a_hundred():
    def is_masked(tokens, **options):
        ids = np.array([CLS, 5, *[6] * (tokens - 1), SEP])
        chosen = make_masker("word", **options)(ids, np.random.default_rng(0))[1] >= 0
        assert not chosen[[0, -1]].any() and len(set(chosen[1:-1])) == 1
        return chosen[1]

    assert is_masked(4) and is_masked(80) and not is_masked(81)
    assert is_masked(107, probability=0.2) and not is_masked(108, probability=0.2)
    assert is_masked(160, probability=0.3) and not is_masked(161, probability=0.3)


@pytest.mark.parametrize("probability", [0, 1, -0.1, 1.5, float("nan")])
def test_a_probability_outside_of_zero_to_one_is_refused(probability):
    with pytest.raises(UserError, match="between 0 and 1"):
        make_masker(probability=probability)


def test_an_unknown_unit_is_refused():
    with pytest.raises(UserError, match="subword, word, ngram"):
        make_masker("sentence")
