import json
import math
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example as also
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mixlm.data.batching import LengthBucketedBatches, collate, evaluation_batches, training_batches
from mixlm.data.hangul import compose_hangul
from mixlm.data.reading import ReadingWindows, Span, Window, best_spans, null_span, predictions_of, read_answers
from mixlm.data.squad import Answer, ReadingExample, count_unanswerable, read_squad
from mixlm.errors import UserError
from mixlm.tokenization import load_tokenizer, train_tokenizer

SENTENCES = [
    "서울은 대한민국의 수도이다. 부산은 항구이다.",
    "The quick brown fox jumps over the lazy dog.",
    "누가 언제 어디서 무엇을 왜 했는가? 😀 1989년 2월 15일",
    unicodedata.normalize("NFD", "흩어진 한글과 café"),
] * 3
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PROPERTY = settings(derandomize=True, deadline=None, database=None, max_examples=40)


def predict(windows, start_logits, end_logits, **decoding):
    """What the files of the official scripts hold."""
    return predictions_of(windows, read_answers(windows, start_logits, end_logits, **decoding))


def wordpiece():
    return train_tokenizer(SENTENCES, 400, min_frequency=1)


def byte_level():
    """As RoBERTa's: a character may be several tokens, and a token may begin with the blank."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return with_special_tokens(tokenizer)


def metaspace():
    """As XLM-R's: blanks are marked on the token behind them, and a mark may be a token of its own."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return with_special_tokens(tokenizer)


def with_special_tokens(tokenizer):
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


TOKENIZERS = {make.__name__: make() for make in (wordpiece, byte_level, metaspace)}
TOKENIZER = TOKENIZERS["wordpiece"]
SMALL = {"max_seq_length": 24, "doc_stride": 6, "max_query_length": 5}


def question(context, *answers, name="q", asked="왜?", is_impossible=False):
    """`answers` are texts (at their first occurrence) or places (start, end)."""
    places = [
        (context.index(each), context.index(each) + len(each)) if isinstance(each, str) else each for each in answers
    ]
    located = tuple(Answer(context[start:end], start) for start, end in places)
    return ReadingExample(
        name, "", context, asked, located, tuple(each.text for each in located), is_impossible, article=0
    )


def words(count):
    """A context of that many different words, and as many tokens or more."""
    return " ".join(f"{'서울부산'[number % 4]}{number}" for number in range(count))


def zeros(windows):
    return [np.zeros(length) for length in windows.lengths]


def gold_logits(windows):
    """Logits that are 1 at the positions to be learned and 0 elsewhere."""
    starts, ends = zeros(windows), zeros(windows)
    for number in range(len(windows)):
        item = windows[0, number]
        if item["start_positions"]:
            starts[number][item["start_positions"]] = 1
            ends[number][item["end_positions"]] = 1
    return starts, ends


def shown(context, offsets, answer):
    """The characters of an answer from the first to the last one that has a token."""
    has_token = np.zeros(len(context), dtype=bool)
    for start, end in offsets:
        has_token[start:end] = True
    places = np.flatnonzero(has_token[answer.start : answer.end])
    return context[answer.start + places[0] : answer.start + places[-1] + 1].strip() if len(places) else ""


class TestWindows:
    def test_one_window(self):
        context = "서울은 대한민국의 수도이다."
        windows = ReadingWindows([question(context, "수도", asked="수도가 어디?")], TOKENIZER)
        assert len(windows) == 1
        item = windows[0, 0]
        asked = TOKENIZER("수도가 어디?", add_special_tokens=False)["input_ids"]
        encoded = TOKENIZER(context, add_special_tokens=False, return_offsets_mapping=True)
        cls, sep = TOKENIZER.cls_token_id, TOKENIZER.sep_token_id
        assert item["input_ids"].tolist() == [cls, *asked, sep, *encoded["input_ids"], sep]
        assert item["token_type_ids"].tolist() == [0] * (len(asked) + 2) + [1] * (len(encoded["input_ids"]) + 1)
        assert item["input_ids"].tolist() == TOKENIZER("수도가 어디?", context)["input_ids"]
        assert item["token_type_ids"].tolist() == TOKENIZER("수도가 어디?", context)["token_type_ids"]
        assert windows.lengths.tolist() == [len(item["input_ids"])]
        assert item["window"] == 0 and windows.example_of_window.tolist() == [0]
        offsets = encoded["offset_mapping"]
        first, last = (item[name] - len(asked) - 2 for name in ("start_positions", "end_positions"))
        assert context[offsets[first][0] : offsets[last][1]].startswith("수도")
        (window,) = windows.windows_of(0)
        assert window.context_position == len(asked) + 2
        assert window.offsets.tolist() == [list(each) for each in offsets]
        assert window.has_max_context.all()

    def test_decomposed_hangul_is_read_as_composed_and_answers_stay_as_they_are(self):
        context, asked = "café에서 그는 대한민국의 수도 서울에 산다.", "수도가 어디? café"
        decomposed = unicodedata.normalize("NFD", context).replace("e\u0301", "é")
        composed = ReadingWindows([question(context, "수도 서울", asked=asked)], TOKENIZER)
        answer = unicodedata.normalize("NFD", "수도 서울")
        example = question(decomposed, answer, asked=unicodedata.normalize("NFD", asked))
        windows = ReadingWindows([example], TOKENIZER)
        for name, value in composed[0, 0].items():
            assert np.array_equal(windows[0, 0][name], value), name
        expected = predict(composed, *gold_logits(composed)).predictions["q"]
        found = predict(windows, *gold_logits(windows)).predictions["q"]
        assert found == unicodedata.normalize("NFD", expected) != expected
        assert answer in found and found in decomposed
        (window,), (other,) = windows.windows_of(0), composed.windows_of(0)
        for (start, end), (other_start, other_end) in zip(window.offsets, other.offsets, strict=True):
            assert unicodedata.normalize("NFC", decomposed[start:end]) == context[other_start:other_end]

    def test_windows_overlap_by_their_stride(self):
        context = words(40)
        windows = ReadingWindows([question(context, "산39")], TOKENIZER, **SMALL)
        encoded = TOKENIZER(context, add_special_tokens=False, return_offsets_mapping=True)
        tokens = len(encoded["input_ids"])
        asked = len(TOKENIZER("왜?", add_special_tokens=False)["input_ids"])
        room = 24 - 3 - asked
        of_example = windows.windows_of(0)
        firsts = range(0, tokens - room + 6, 6)
        for first, window in zip(firsts, of_example, strict=True):
            assert window.offsets.tolist() == [list(each) for each in encoded["offset_mapping"][first : first + room]]
        sizes = [len(window.offsets) for window in of_example]
        assert set(sizes[:-1]) == {room} and sizes[-1] == tokens - firsts[-1]
        assert windows.lengths.tolist() == [size + asked + 3 for size in sizes]
        # The answer is in the last windows alone; in the others [CLS] is what is to be learned.
        positions = [windows[0, number]["start_positions"] for number in range(len(windows))]
        assert positions[0] == 0 and positions[-1] > 0

    @pytest.mark.parametrize("count", [260, 261, 262, 263])
    def test_the_window_of_most_context_is_that_of_run_squad(self, count):
        """A hundredth of the window's length counts too: the last one may be more than 100 tokens shorter."""
        windows = ReadingWindows([question("서 " * count)], TOKENIZER, 256, doc_stride=128, max_query_length=5)
        of_example = windows.windows_of(0)
        borders = [(128 * number, 128 * number + len(window.offsets)) for number, window in enumerate(of_example)]
        assert borders[-1][1] == count and len(borders) > 1
        for token in range(count):
            scores = [
                min(token - first, last - 1 - token) + 0.01 * (last - first) if first <= token < last else -1
                for first, last in borders
            ]
            flags = [
                first <= token < last and bool(window.has_max_context[token - first])
                for window, (first, last) in zip(of_example, borders, strict=True)
            ]
            assert flags == [number == scores.index(max(scores)) for number in range(len(borders))]

    @pytest.mark.parametrize("beside", [-1, 0, 1, 5, 6, 7])
    def test_a_context_that_just_fits(self, beside):
        context = words(60)
        tokens = len(TOKENIZER(context, add_special_tokens=False)["input_ids"])
        asked = len(TOKENIZER("왜?", add_special_tokens=False)["input_ids"])
        length = tokens + asked + 3 - beside
        windows = ReadingWindows([question(context, "서0")], TOKENIZER, length, doc_stride=6, max_query_length=5)
        assert len(windows) == 1 + math.ceil(max(0, beside) / 6)
        assert windows.windows_of(0)[-1].offsets[-1, 1] == len(context)
        assert windows.lengths.max() == min(length, tokens + asked + 3)

    def test_long_questions_are_cut_and_counted(self):
        examples = [question("서울은", "서울", name=asked, asked=asked) for asked in ("왜?", words(30), words(31))]
        windows = ReadingWindows(examples, TOKENIZER, max_query_length=5)
        assert windows.cut_questions == 2
        assert windows.windows_of(1)[0].context_position == 7

    def test_special_tokens_in_a_text_are_text(self):
        windows = ReadingWindows([question("[SEP] 서울 [MASK]", "서울", asked="[SEP]?")], TOKENIZER)
        ids = windows[0, 0]["input_ids"].tolist()
        assert ids.count(TOKENIZER.sep_token_id) == 2 and TOKENIZER.mask_token_id not in ids

    def test_truncation_and_padding_of_the_tokenizer_do_not_count(self):
        examples = [question(words(20), "산3")]
        expected = ReadingWindows(examples, TOKENIZER)[0, 0]["input_ids"]
        tokenizer = wordpiece()
        tokenizer.backend_tokenizer.enable_truncation(2)
        tokenizer.backend_tokenizer.enable_padding(length=64)
        assert (ReadingWindows(examples, tokenizer)[0, 0]["input_ids"] == expected).all()
        assert tokenizer.backend_tokenizer.truncation is not None

    def test_an_answer_inside_a_token_takes_all_of_it(self):
        context = "the quick brown fox"
        windows = ReadingWindows([question(context, "ick brow")], TOKENIZER)
        assert predict(windows, *gold_logits(windows)).predictions["q"] == "quick brown"

    def test_what_stands_directly_beside_an_answer_is_none_of_it(self):
        windows = ReadingWindows([question("(서울)", "서울")], TOKENIZER)
        assert predict(windows, *gold_logits(windows)).predictions["q"] == "서울"

    def test_an_answer_is_learned_from_the_windows_that_hold_all_of_it(self):
        context = words(40)
        encoded = TOKENIZER(context, add_special_tokens=False, return_offsets_mapping=True)
        places = encoded["offset_mapping"]
        for first in range(len(places) - 3):
            answer = (places[first][0], places[first + 3][1])
            windows = ReadingWindows([question(context, answer)], TOKENIZER, **SMALL)
            for number, window in enumerate(windows.windows_of(0)):
                shown = [tuple(each) for each in window.offsets]
                start, end = windows[0, number]["start_positions"], windows[0, number]["end_positions"]
                if places[first] in shown and places[first + 3] in shown:
                    assert shown[start - window.context_position] == places[first]
                    assert shown[end - window.context_position] == places[first + 3]
                else:
                    assert start == end == 0

    def test_the_first_answer_is_learned(self):
        context = "서울 부산 서울"
        windows = ReadingWindows([question(context, "부산", "서울")], TOKENIZER)
        assert predict(windows, *gold_logits(windows)).predictions["q"] == "부산"

    def test_unanswerable_questions_point_to_cls(self):
        windows = ReadingWindows([question(words(50), is_impossible=True)], TOKENIZER, training=True, **SMALL)
        assert len(windows) > 1
        assert {windows[0, number]["start_positions"] for number in range(len(windows))} == {0}

    def test_what_cannot_be_learned_is_left_out_in_training_alone(self):
        no_token = "\u200e"  # the tokenizer drops it
        examples = [
            question("서울", "서울", name="good"),
            question("서울", name="not found"),
            question(f"서울 {no_token}", no_token, name="no token"),
            question(f"서울 {no_token}", no_token, "서울", name="second"),
            question("서울", name="none", is_impossible=True),
        ]
        windows = ReadingWindows(examples, TOKENIZER, training=True)
        assert [example.id for example in windows.examples] == ["good", "second", "none"]
        (skipped,) = windows.skipped
        assert skipped.id == "no token" and "drops every character" in skipped.reason
        windows = ReadingWindows(examples, TOKENIZER)
        assert windows.examples == examples and windows.skipped == [skipped]
        assert [windows[0, number]["end_positions"] > 0 for number in range(5)] == [True, False, False, True, False]

    @pytest.mark.parametrize(
        ("options", "parts"),
        [
            ({"doc_stride": 317}, ("doc_stride 317", "room for 317", "such as 158")),
            ({"max_seq_length": 128}, ("doc_stride 128", "room for 61")),
            ({"max_seq_length": 64}, ("max_seq_length 64", "no room")),
            ({"doc_stride": 0}, ("doc_stride 0", "1 or more")),
            ({"max_query_length": 0}, ("max_query_length 0", "1 or more")),
        ],
    )
    def test_lengths_that_do_not_work(self, options, parts):
        with pytest.raises(UserError) as caught:
            ReadingWindows([question("서울", "서울")], TOKENIZER, **options)
        assert all(part in str(caught.value) for part in parts), caught.value

    def test_batches(self):
        examples = [question(words(count), "서0", name=str(count)) for count in range(1, 30)]
        windows = ReadingWindows(examples, TOKENIZER, training=True, **SMALL)
        fields = {"input_ids", "attention_mask", "token_type_ids", "start_positions", "end_positions", "window"}

        batches = LengthBucketedBatches(windows.lengths, seed=1, rows_per_step=4)
        _, (batch,) = next(training_batches(windows, batches, None, TOKENIZER.pad_token_id))
        assert set(batch) == fields
        assert batch["input_ids"].shape == batch["token_type_ids"].shape and batch["start_positions"].shape == (4,)

        seen = []
        for batch, counts in evaluation_batches(windows, 4, TOKENIZER.pad_token_id):
            assert counts
            for row, number in enumerate(batch["window"].tolist()):
                item = windows[0, number]
                assert batch["attention_mask"][row].sum() == len(item["input_ids"]) == windows.lengths[number]
                assert batch["start_positions"][row] == item["start_positions"]
            seen += batch["window"].tolist()
        assert sorted(seen) == list(range(len(windows)))

    def test_a_context_without_tokens(self):
        windows = ReadingWindows([question("\u200e", asked="\u200e", is_impossible=True)], TOKENIZER)
        assert windows[0, 0]["input_ids"].tolist() == [TOKENIZER.cls_token_id] + [TOKENIZER.sep_token_id] * 2
        padded = collate([windows[0, 0]], TOKENIZER.pad_token_id)
        assert padded["input_ids"].shape == (1, 3)
        result = predict(windows, zeros(windows), zeros(windows), unanswerable=True)
        assert result.predictions == {"q": ""} and len(result.nbest_predictions["q"]) == 1
        assert predict(windows, zeros(windows), zeros(windows)).predictions == {"q": ""}
        # There is nothing else to choose, whatever the scores and the threshold.
        low = [logits - 5 for logits in zeros(windows)]
        result = predict(windows, low, low, unanswerable=True, null_threshold=1e9)
        assert result.predictions == {"q": ""} and result.nbest_predictions["q"][0]["start_logit"] == -5


def window_of(offsets, *, max_context=None, context_position=1, number=0):
    offsets = np.array(offsets).reshape(-1, 2)
    flags = np.ones(len(offsets), dtype=bool) if max_context is None else np.array(max_context, dtype=bool)
    return Window(number, context_position, offsets, flags)


class TestBestSpans:
    CONTEXT = "ab cd ef gh"
    OFFSETS = [(0, 2), (3, 5), (6, 8), (9, 11)]

    def best(self, starts, ends, **options):
        # [CLS] and [SEP] have the highest logits of all: spans are inside the context.
        starts, ends = np.array([99, *starts, 99.0, 99.0]), np.array([99, *ends, 99.0, 99.0])
        return best_spans(self.CONTEXT, [window_of(self.OFFSETS)], [starts], [ends], **options)

    def test_order_and_fields(self):
        spans = self.best([1, 5, 0, 3], [0, 2, 4, 1])
        assert spans[0] == Span("cd ef", 3, 8, 9.0, 5.0, 4.0)
        assert [span.text for span in spans[:3]] == ["cd ef", "cd", "cd ef gh"]
        assert len(spans) == 10  # 4 + 3 + 2 + 1
        assert all(one.score >= other.score for one, other in pairwise(spans))

    def test_an_end_is_never_before_its_start(self):
        assert self.best([0, 0, 0, 9], [9, 0, 0, 0], n_best_size=2)[0].text in ("gh", "ab")

    def test_max_answer_length_is_in_tokens(self):
        assert {span.text for span in self.best([0] * 4, [0] * 4, max_answer_length=2)} == {
            "ab",
            "cd",
            "ef",
            "gh",
            "ab cd",
            "cd ef",
            "ef gh",
        }

    def test_n_best_size(self):
        assert [span.text for span in self.best([4, 3, 2, 1], [0, 0, 0, 0], n_best_size=3, max_answer_length=1)] == [
            "ab",
            "cd",
            "ef",
        ]
        # Of equals, the first.
        assert [span.text for span in self.best([0] * 4, [0] * 4, n_best_size=2)] == ["ab", "ab cd"]

    def test_equal_texts_are_one(self):
        context = " ".join(["같은"] * 200 + ["다른"])
        offsets = [(3 * number, 3 * number + 2) for number in range(201)]
        starts = np.concatenate([[0], np.arange(201, 0, -1.0)])
        spans = best_spans(context, [window_of(offsets)], [starts], [np.zeros(202)], max_answer_length=1)
        assert [(span.text, span.start_char) for span in spans] == [("같은", 0), ("다른", 600)]

    def test_a_span_starts_where_its_token_has_most_context(self):
        windows = [
            window_of(self.OFFSETS[:3], max_context=[1, 1, 0]),
            window_of(self.OFFSETS[1:], max_context=[0, 0, 1], number=1),
        ]
        windows[1].has_max_context[1] = True
        starts = [np.array([0, 1, 2, 9.0]), np.array([0, 9, 3, 0.0])]
        ends = [np.array([0, 0, 0, 5.0]), np.array([0, 9, 1, 2.0])]
        spans = best_spans(self.CONTEXT, windows, starts, ends)
        # "ef" of the first window and "cd" of the second are not starts; "cd ef gh" is in no window of its start.
        assert [(span.text, span.score) for span in spans] == [
            ("cd ef", 7.0),
            ("ab cd ef", 6.0),
            ("ef gh", 5.0),
            ("ef", 4.0),
            ("cd", 2.0),
            ("gh", 2.0),
            ("ab", 1.0),
            ("ab cd", 1.0),
        ]

    def test_blanks_around_a_text_are_left_out(self):
        offsets = [(0, 2), (2, 5), (5, 6), (6, 8)]  # "ab", " cd", " ", "ef"
        spans = best_spans(self.CONTEXT, [window_of(offsets)], [np.zeros(5)], [np.zeros(5)])
        for span in spans:
            assert span.text == span.text.strip() == self.CONTEXT[span.start_char : span.end_char] != ""

    @pytest.mark.parametrize(
        ("korean_particles", "texts"),
        [(False, ["서울에서", "서울", "에서", "그는"]), (True, ["서울", "에서", "그"])],
    )
    def test_texts_that_are_equal_without_their_particles_are_one(self, korean_particles, texts):
        context, offsets = "그는 서울에서 잤다", [(0, 2), (3, 5), (5, 7)]
        starts, ends = np.array([0.0, 1, 9, 5]), np.array([0.0, 1, 4, 6])
        spans = best_spans(
            context, [window_of(offsets)], [starts], [ends], max_answer_length=2, korean_particles=korean_particles
        )
        assert [span.text for span in spans if "는 서" not in span.text] == texts
        assert spans[0].score == 15.0  # as it was scored with its particle
        assert all(context[span.start_char : span.end_char] == span.text for span in spans)

    @pytest.mark.parametrize("options", [{"n_best_size": 0}, {"max_answer_length": 0}])
    def test_options(self, options):
        with pytest.raises(UserError, match="1 or more"):
            self.best([0] * 4, [0] * 4, **options)

    @pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
    def test_scores_that_are_no_numbers(self, wrong):
        with pytest.raises(UserError, match="window 0 are not all finite"):
            self.best([0, wrong, 0, 0], [0] * 4)
        with pytest.raises(UserError, match="window 0 are not all finite"):
            self.best([0] * 4, [0, 0, wrong, 0])

    def test_scores_are_sums_beyond_what_the_logits_can_hold(self):
        starts, ends = np.array([0, 60000, 1, 1, 1, 0], np.float16), np.array([0, 32, 60000, 1, 1, 0], np.float16)
        best, second, *_ = best_spans(self.CONTEXT, [window_of(self.OFFSETS)], [starts], [ends])
        assert best == Span("ab cd", 0, 5, 120_000.0, 60_000.0, 60_000.0)
        assert second == Span("ab", 0, 2, 60_032.0, 60_000.0, 32.0)

    def test_null_span(self):
        starts, ends = [np.array([3, 9.0]), np.array([1, 9.0])], [np.array([0, 9.0]), np.array([1.5, 9.0])]
        assert null_span(starts, ends) == Span("", 0, 0, 2.5, 1.0, 1.5)


class TestPredict:
    @pytest.fixture
    def windows(self):
        return ReadingWindows(
            [question("서울 부산", "서울", name="a"), question("서울 부산", name="b", is_impossible=True)], TOKENIZER
        )

    def logits(self, windows, null):
        starts, ends = gold_logits(windows)
        for each in (starts, ends):
            for window, value in zip(each, null, strict=True):
                window[0] = value
        return starts, ends

    def test_files(self, windows):
        result = predict(windows, *self.logits(windows, (0.5, 2)), unanswerable=True)
        assert result.predictions == {"a": "서울", "b": ""}
        assert result.null_odds == {"a": -1.0, "b": 4.0}
        candidates = result.nbest_predictions["a"]
        assert [each["text"] for each in candidates[:2]] == ["서울", "서울 부산"]
        assert set(candidates[0]) == {"text", "probability", "start_logit", "end_logit"}
        assert (candidates[0]["start_logit"], candidates[0]["end_logit"]) == (1.0, 1.0)
        assert sum(each["probability"] for each in candidates) == pytest.approx(1)
        ratio = candidates[0]["probability"] / candidates[1]["probability"]
        assert ratio == pytest.approx(math.exp(1))
        assert [each["text"] for each in candidates].count("") == 1
        assert result.nbest_predictions["b"][0]["text"] == ""
        assert json.loads(json.dumps(result.nbest_predictions)) == result.nbest_predictions

    @pytest.mark.parametrize("shift", [-1000, 1000])
    def test_probabilities_of_scores_of_any_size(self, windows, shift):
        starts, ends = self.logits(windows, (0.5, 2))
        shifted = predict(windows, [each + shift for each in starts], ends, unanswerable=True).nbest_predictions
        for name, candidates in predict(windows, starts, ends, unanswerable=True).nbest_predictions.items():
            expected = [each["probability"] for each in candidates]
            assert [each["probability"] for each in shifted[name]] == pytest.approx(expected)

    def test_without_unanswerable_questions(self, windows):
        result = predict(windows, *self.logits(windows, (9, 9)))
        assert result.predictions["a"] == "서울" and result.predictions["b"] != ""
        assert result.null_odds == {}
        assert all(each["text"] for each in result.nbest_predictions["a"])

    @pytest.mark.parametrize(("threshold", "expected"), [(-1.5, ""), (-1.0, "서울"), (0, "서울")])
    def test_null_threshold(self, windows, threshold, expected):
        logits = self.logits(windows, (0.5, 2))
        assert predict(windows, *logits, unanswerable=True, null_threshold=threshold).predictions["a"] == expected

    def test_no_answer_is_always_a_candidate(self, windows):
        logits = self.logits(windows, (-50, -50))
        texts = [
            each["text"] for each in predict(windows, *logits, unanswerable=True, n_best_size=1).nbest_predictions["a"]
        ]
        assert texts == ["서울", ""]
        logits = self.logits(windows, (50, 50))
        texts = [
            each["text"] for each in predict(windows, *logits, unanswerable=True, n_best_size=1).nbest_predictions["a"]
        ]
        assert texts == ["", "서울"]  # as is the best answer, for a threshold to choose it

    def test_padded_logits_are_one_array(self, windows):
        starts, ends = self.logits(windows, (0.5, 2))
        padded = [np.stack([np.pad(each, (0, 5), constant_values=99) for each in logits]) for logits in (starts, ends)]
        assert predict(windows, *padded, unanswerable=True) == predict(windows, starts, ends, unanswerable=True)


KOREAN = st.text(st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3), min_size=1, max_size=5)
PIECES = st.one_of(
    KOREAN,
    KOREAN.map(lambda text: unicodedata.normalize("NFD", text)),
    st.text(st.sampled_from(sorted(set("".join(SENTENCES)))), min_size=1, max_size=12),
    st.text(
        st.sampled_from("abcXYZ019.,!?()[]#e\u0301a\u0308\u200b\u200d\u200e\ufeff\u00a0\u3000\n漢字ﷺ😀👨‍👩‍👧🇰🇷❤️"),
        min_size=1,
        max_size=8,
    ),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5),
)
CONTEXTS = st.lists(PIECES, min_size=1, max_size=12).map(" ".join).filter(str.strip)
PLACES = st.tuples(st.floats(0, 1), st.floats(0, 1))


def answer_at(context, shares):
    start, end = sorted(min(int(share * len(context)), len(context) - 1) for share in shares)
    return start, end + 1


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
class TestAnyText:
    @PROPERTY
    @given(context=CONTEXTS, shares=PLACES)
    @also(context="\u200e서울\u00a0e\u0301 👨‍👩‍👧\u200e", shares=(0.0, 0.99))
    @also(context=unicodedata.normalize("NFD", "한글 흩어진"), shares=(0.0, 0.3))
    def test_gold_positions_give_the_answer_back(self, tokenizer, context, shares):
        example = question(context, answer_at(context, shares))
        windows = ReadingWindows([example], tokenizer, training=True)
        if not len(windows):
            assert windows.skipped[0].id == "q"
            return
        predicted = predict(windows, *gold_logits(windows), max_answer_length=400).predictions["q"]
        offsets = np.concatenate([window.offsets for window in windows.windows_of(0)])
        assert predicted in context
        assert shown(context, offsets, example.answers[0]) in predicted

    @PROPERTY
    @given(context=CONTEXTS, stride=st.integers(1, 15), room=st.integers(2, 16))
    def test_windows_cover_the_context(self, tokenizer, context, stride, room):
        asked = len(tokenizer("왜?", add_special_tokens=False)["input_ids"])
        stride = min(stride, room - 1)
        windows = ReadingWindows([question(context, is_impossible=True)], tokenizer, room + asked + 3, stride, asked)
        composed, borders = compose_hangul(context)
        how = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
        encoded = tokenizer(composed, **how)
        offsets = [tuple(borders[list(each)].tolist()) for each in encoded["offset_mapping"]]
        tokens = len(encoded["input_ids"])
        in_windows, with_max_context = np.zeros(tokens, dtype=int), np.zeros(tokens, dtype=int)
        of_example = windows.windows_of(0)
        for place, window in enumerate(of_example):
            first = place * stride
            part = slice(first, first + len(window.offsets))
            assert [tuple(each) for each in window.offsets] == offsets[part]
            ids = windows[0, window.number]["input_ids"][window.context_position : -1]
            assert ids.tolist() == encoded["input_ids"][part]
            in_windows[part] += 1
            with_max_context[part] += window.has_max_context
            for token in np.flatnonzero(window.has_max_context) + first:
                around = [context_around(token - n * stride, other) for n, other in enumerate(of_example)]
                assert around[place] == max(around)
        assert (in_windows >= 1).all() and (with_max_context == 1).all()

    @PROPERTY
    @given(context=CONTEXTS, seed=st.integers(0, 1000), longest=st.integers(1, 6), size=st.integers(1, 30))
    def test_the_best_spans_are_those_of_trying_all(self, tokenizer, context, seed, longest, size):
        asked = len(tokenizer("왜?", add_special_tokens=False)["input_ids"])
        windows = ReadingWindows([question(context, is_impossible=True)], tokenizer, 12 + asked + 3, 4, asked)
        random = np.random.default_rng(seed)
        # Few different values, so that there are equals.
        starts, ends = ([random.integers(-4, 4, n) / 2 for n in windows.lengths] for _ in range(2))
        found = best_spans(context, windows.windows_of(0), starts, ends, size, longest)
        assert [span.score for span in found] == [span.score for span in try_all(windows, starts, ends, size, longest)]
        assert len({span.text for span in found}) == len(found)
        for span in found:
            assert span.text == context[span.start_char : span.end_char]
            assert span.score == span.start_logit + span.end_logit


def context_around(place, window):
    size = len(window.offsets)
    return min(place, size - 1 - place) + 0.01 * size if 0 <= place < size else -1


def try_all(windows, starts, ends, size, longest):
    context = windows.examples[0].context
    best = {}
    for window in windows.windows_of(0):
        tokens = len(window.offsets)
        for first in np.flatnonzero(window.has_max_context):
            for last in range(first, min(first + longest, tokens)):
                text = context[window.offsets[first, 0] : window.offsets[last, 1]].strip()
                start = starts[window.number][window.context_position + first]
                end = ends[window.number][window.context_position + last]
                if text and (text not in best or best[text].score < start + end):
                    best[text] = Span(text, 0, 0, start + end, start, end)
    return sorted(best.values(), key=lambda span: -span.score)[:size]


@pytest.mark.parametrize("name", ["KorQuAD_v1.0_dev", "squad2_part", "tydiqa_en_dev"])
def test_real_questions(real_data, name):
    """All gold answers come back, but for what tokens cannot cut out and answers longer than may be."""
    tokenizer = load_tokenizer(real_data / "vocab_ko")
    examples = read_squad(real_data / "mrc" / f"{name}.json").examples[:300]
    windows = ReadingWindows(examples, tokenizer)
    assert windows.skipped == [] and windows.lengths.max() <= 384
    starts, ends = gold_logits(windows)
    for number, example in enumerate(windows.example_of_window):
        starts[number][0] = 0.5 if examples[example].answers else 2
    result = predict(windows, starts, ends, unanswerable=True, max_answer_length=60)
    assert [odds > 0 for odds in result.null_odds.values()] == [example.is_impossible for example in examples]
    assert count_unanswerable(examples) == sum(not text for text in result.predictions.values())
    missed = [
        example
        for example in examples
        if example.answers and example.answers[0].text.strip() not in result.predictions[example.id]
    ]
    assert all(len(tokenizer.tokenize(example.answers[0].text)) > 55 for example in missed)
