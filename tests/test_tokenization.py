"""Tokenizers: what training promises, what loading refuses, and numbers that can be checked by hand."""

import json
import math
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from mixlm import tokenization
from mixlm.data.squad import Answer
from mixlm.errors import UserError
from mixlm.tokenization import (
    LONGEST_WORD,
    SPECIAL_TOKENS,
    answers_on_token_borders,
    load_tokenizer,
    tokenizer_from_vocab,
    tokenizer_report,
    train_tokenizer,
    word_start_table,
)

REPOSITORY = Path(__file__).parent.parent
SENTENCES = [
    "나는 학교에 간다.",
    "나는 학교에서 한글을 배웠다!",
    "학교는 서울에 있다 (서울특별시).",
    "The Quick brown fox, the quick Café.",
    "한자는 漢字라고 쓴다. 값은 1,000원 ☃ 😀",
    unicodedata.normalize("NFD", "한글은 흩어져도 é 한글이다"),
] * 3
SEEN = set("".join(SENTENCES))

# Deterministic: the same examples every time, and no time limit on a machine that is shared.
PROPERTY = settings(derandomize=True, deadline=None, database=None, max_examples=150)
KOREAN_AND_ALL_ELSE = st.lists(
    st.one_of(
        st.text(st.sampled_from(sorted(SEEN)), max_size=12),
        st.text(st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3), max_size=6),
        st.text(st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3), max_size=4).map(
            lambda text: unicodedata.normalize("NFD", text)
        ),
        st.text(
            st.sampled_from(
                "abcXYZ0189.,!?()[]#\u0301\u0308\u200b\u200d\ufeff\u00a0\u3000\t\n漢字樂李ㅋㅎ😀👨‍👩‍👧🇰🇷❤️"
            ),
            max_size=8,
        ),
        st.text(max_size=6),
    ),
    max_size=8,
).map(" ".join)


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(SENTENCES, 250, show_progress=False)


def cut(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    return tokenizer.tokenize(text)


class TestTraining:
    def test_special_tokens_come_first_and_ids_have_no_holes(self, trained):
        assert trained.convert_ids_to_tokens(range(5)) == list(SPECIAL_TOKENS)
        assert (trained.pad_token_id, trained.unk_token_id, trained.cls_token_id) == (0, 1, 2)
        assert (trained.sep_token_id, trained.mask_token_id) == (3, 4)
        assert sorted(trained.get_vocab().values()) == list(range(len(trained)))

    def test_frequent_words_become_tokens(self, trained):
        assert cut(trained, "서울특별시 배웠다") == ["서울특별시", "배웠다"]

    def test_nouns_and_their_particles_stay_apart(self, trained):
        # Both always occur with a particle here, often enough to become one token with it.
        assert cut(trained, "학교에서") == ["학교", "##에서"]
        assert cut(trained, "한글을") == ["한글", "##을"]

    @pytest.mark.parametrize(
        ("word", "parts"),
        [
            ("학교에서", ("학교", "에서")),
            ("서울로", ("서울", "로")),  # ㄹ goes with the vowels here
            ("서울을", ("서울", "을")),  # and with the consonants here
            ("부산으로", ("부산", "으로")),
            ("부산로", ("부산로", "")),  # 로 never follows another consonant: a street's name
            ("아이를", ("아이", "를")),
            ("어린이", ("어린", "이")),  # wrong, but it only costs a token
            ("나무가", ("나무", "가")),
            ("사나이", ("사나이", "")),  # 이 never follows a vowel
            ("나는", ("나는", "")),  # too short
            ("IBM은", ("IBM", "은")),
            ("school", ("school", "")),
        ],
    )
    def test_split_particle(self, word, parts):
        assert tokenization._split_particle(word) == parts

    def test_one_sentence_and_pair_are_framed(self, trained):
        pair = trained("나는", "학교는")
        tokens = trained.convert_ids_to_tokens(pair["input_ids"])
        first_sep = tokens.index("[SEP]")
        assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and tokens.count("[SEP]") == 2
        assert pair["token_type_ids"] == [0] * (first_sep + 1) + [1] * (len(tokens) - first_sep - 1)
        assert trained.convert_ids_to_tokens(trained("나는")["input_ids"]) == tokens[: first_sep + 1]

    def test_case_is_kept_unless_lowercase(self, trained):
        assert "Quick" in trained.decode(trained("Quick")["input_ids"])
        folded = train_tokenizer(SENTENCES, 250, lowercase=True, show_progress=False)
        assert cut(folded, "QUICK Café") == cut(folded, "quick café")
        assert not any(token != token.lower() for token in folded.get_vocab() if token not in SPECIAL_TOKENS)

    @pytest.mark.parametrize("lowercase", [False, True])
    def test_neither_hangul_nor_accents_are_taken_apart(self, lowercase):
        tokenizer = train_tokenizer(["한글 café"] * 3, 100, lowercase=lowercase, show_progress=False)
        assert cut(tokenizer, "한글 café") == ["한글", "café"]
        assert tokenizer.decode(tokenizer("한글 café", add_special_tokens=False)["input_ids"]) == "한글 café"

    def test_every_seen_character_can_begin_and_continue_a_word(self, trained):
        # "간" was only seen at the beginning of a word, "다" mostly at its end.
        assert trained.unk_token not in cut(trained, "다간 간간 다다간")

    def test_too_little_text_gives_a_smaller_vocabulary(self):
        tokenizer = train_tokenizer(["가나 가나"], 1000, show_progress=False)
        assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == [
            *SPECIAL_TOKENS, "가", "나", "##가", "##나", "가나",
        ]  # fmt: skip

    def test_min_frequency(self):
        sentences = ["가나"] * 5 + ["다라"] * 2
        assert {"가나", "다라"} <= set(train_tokenizer(sentences, 99, show_progress=False).get_vocab())
        vocabulary = train_tokenizer(sentences, 99, min_frequency=3, show_progress=False).get_vocab()
        assert "가나" in vocabulary and "다라" not in vocabulary

    @pytest.mark.parametrize(
        ("vocab_size", "kept"),
        [
            (5 + 2 * (1000 + 8), 1000),  # all characters fit into one half
            (5 + 1600, 1000 - 30),  # left out as long as they make 0.0001 of 301,000 characters
            (5 + 800, 600 - 8),  # left out until they fit into three quarters
        ],
    )
    def test_rare_characters_do_not_crowd_out_the_words(self, vocab_size, kept):
        rare = {chr(0x4E00 + index) for index in range(1000)}  # Han characters need one token, the four others two
        tokenizer = train_tokenizer(["학교 서울 학교"] * 50_000 + sorted(rare), vocab_size, show_progress=False)
        assert len(rare & set(tokenizer.get_vocab())) == kept
        assert cut(tokenizer, "학교 서울") == ["학교", "서울"]

    def test_left_out_characters_make_no_neighbours(self, monkeypatch):
        monkeypatch.setattr(tokenization, "RARE_CHARACTERS", 0.2)
        tokenizer = train_tokenizer(["가☃나 가☃나", "가 나 가 나 가 나 가 나"], 13, show_progress=False)
        assert set(tokenizer.get_vocab()) == {*SPECIAL_TOKENS, "가", "나", "##가", "##나"}

    def test_equally_rare_characters_are_left_out_in_the_same_order_whatever_that_of_the_text(self):
        sentences = [*(["가나 가나"] * 2000), *"다라마바사아자차"]
        vocabularies = [
            train_tokenizer(each, 30, show_progress=False).get_vocab() for each in (sentences, sentences[::-1])
        ]
        assert vocabularies[0] == vocabularies[1] and 1 <= len({*"다라마바사아자차"} & vocabularies[0].keys()) < 8

    def test_nothing_is_learned_from_what_is_too_long_for_a_word(self):
        blocks = ["가나" * (LONGEST_WORD // 2 + 1)] * 5
        tokens = train_tokenizer([*blocks, "다라 다라"], 100, show_progress=False).get_vocab().keys()
        assert "다라" in tokens and tokens == {*SPECIAL_TOKENS, *"가나다라", "##가", "##나", "##다", "##라", "다라"}

    def test_long_words(self, trained):
        assert trained.unk_token not in cut(trained, "나는" * (LONGEST_WORD // 2))
        assert cut(trained, "나" * (LONGEST_WORD + 1)) == [trained.unk_token]

    def test_sentences_are_read_once_and_not_kept(self):
        class Sentence(str):
            alive = 0

            def __new__(cls, text):
                cls.alive += 1
                return super().__new__(cls, text)

            def __del__(self):
                type(self).alive -= 1

        most = 0

        def stream():
            nonlocal most
            for _ in range(1000):
                yield Sentence("나는 학교에 간다")
                most = max(most, Sentence.alive)

        train_tokenizer(stream(), 50, show_progress=False)
        assert most <= 3

    def test_counting_in_parts_changes_nothing(self, trained, monkeypatch):
        monkeypatch.setattr(tokenization, "EOJEOLS_HELD", 3)
        assert train_tokenizer(SENTENCES, 250, show_progress=False).get_vocab() == trained.get_vocab()

    @pytest.mark.parametrize(
        ("sentences", "options", "message"),
        [
            ([], {}, "the corpus holds no text"),
            (["  ", "\u200b"], {}, "the corpus holds no text"),
            (["가"], {"vocab_size": 5}, "vocab_size 5"),
            (["가"], {"min_frequency": 0}, "min_frequency 0"),
        ],
    )
    def test_refused(self, sentences, options, message):
        with pytest.raises(UserError, match=message):
            train_tokenizer(sentences, show_progress=False, **options)


class TestDeterminism:
    # Many equally frequent pairs: the trainer on its own finds another vocabulary at every call here.
    TIES = [f"{first}{second}{third}" for first in "가나다라마" for second in "바사아자차" for third in "카타파하"] * 2

    def test_training_twice(self):
        vocabulary = train_tokenizer(self.TIES, 60, show_progress=False).get_vocab()
        assert len(vocabulary) == 60
        for _ in range(5):
            assert train_tokenizer(self.TIES, 60, show_progress=False).get_vocab() == vocabulary

    def test_order_of_sentences_does_not_matter(self):
        vocabulary = train_tokenizer(self.TIES, 60, show_progress=False).get_vocab()
        assert train_tokenizer(self.TIES[::-1], 60, show_progress=False).get_vocab() == vocabulary

    def test_in_another_process(self, tmp_path):
        # The package is put in place by hand: its __init__ would import torch, which takes longer than the training.
        code = (
            "import json, sys, types\n"
            "package = types.ModuleType('mixlm'); package.__path__ = [sys.argv[1]]; sys.modules['mixlm'] = package\n"
            "from mixlm.tokenization import train_tokenizer\n"
            "tokenizer = train_tokenizer(json.load(sys.stdin), 60, show_progress=False)\n"
            "print(json.dumps(tokenizer.get_vocab()))\n"
        )
        expected = train_tokenizer(self.TIES, 60, show_progress=False).get_vocab()
        # Here in the tests tokenizers runs on one thread.
        several_threads = {"PYTHONHASHSEED": "1", "RAYON_NUM_THREADS": "4", "TOKENIZERS_PARALLELISM": "true"}
        process = subprocess.run(
            [sys.executable, "-c", code, str(REPOSITORY / "mixlm")],
            input=json.dumps(self.TIES),
            capture_output=True,
            text=True,
            env=os.environ | several_threads,
            cwd=tmp_path,
        )
        assert process.returncode == 0, process.stderr
        assert json.loads(process.stdout) == expected


class TestOffsets:
    @PROPERTY
    @given(text=KOREAN_AND_ALL_ELSE)
    @example(text=unicodedata.normalize("NFD", "한글은 é"))
    @example(text="a\u200bb 李씨(漢字) 👨‍👩‍👧")
    def test_every_token_is_its_piece_of_the_text(self, trained, text):
        encoding = trained.backend_tokenizer.encode(text, add_special_tokens=False)
        normalize = trained.backend_tokenizer.normalizer.normalize_str
        position = 0
        for token, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True):
            assert position <= start < end <= len(text)
            # What is skipped between two tokens is blank, or dropped (a zero-width space).
            assert not normalize(text[position:start]).strip()
            piece = normalize(text[start:end]).strip()
            if token == "[UNK]":
                assert len(piece) > LONGEST_WORD or not set(piece) <= SEEN, "UNK although every character was seen"
            else:
                assert piece == token.removeprefix("##")
            position = end
        assert not normalize(text[position:]).strip()

    @PROPERTY
    @given(text=KOREAN_AND_ALL_ELSE)
    def test_word_start_table_agrees_with_word_ids(self, trained, text):
        encoding = trained(text, add_special_tokens=False)
        words = encoding.word_ids()
        begins = [index == 0 or word != words[index - 1] for index, word in enumerate(words)]
        assert word_start_table(trained)[np.array(encoding["input_ids"], dtype=int)].tolist() == begins

    def test_decomposed_hangul_keeps_its_offsets(self, trained):
        text = unicodedata.normalize("NFD", "한글이 흩어져")
        encoding = trained(text, add_special_tokens=False, return_offsets_mapping=True)
        assert trained.unk_token_id not in encoding["input_ids"]
        assert "".join(text[start:end] for start, end in encoding["offset_mapping"]) == text.replace(" ", "")

    def test_nfc_is_left_out_because_its_offsets_lose_the_end_of_a_syllable(self):
        # If this fails, tokenizers has been mended, and NFC can go into the normalizer.
        tokenizer = Tokenizer(models.WordLevel({"한글": 0, "[UNK]": 1}, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        text = unicodedata.normalize("NFD", "한글")
        encoding = tokenizer.encode(text)
        assert encoding.tokens == ["한글"]
        assert encoding.offsets != [(0, len(text))]

    def test_real_contexts(self, real_data):
        tokenizer = tokenizer_from_vocab(real_data / "vocab_ko" / "vocab.txt")
        articles = json.loads((real_data / "mrc" / "KorQuAD_v1.0_dev.json").read_text(encoding="utf-8"))["data"]
        contexts = [paragraph["context"] for article in articles[:20] for paragraph in article["paragraphs"]]
        for context, encoding in zip(contexts, tokenizer(contexts, add_special_tokens=False).encodings, strict=True):
            position = 0
            for token, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True):
                assert not context[position:start].strip()
                assert token == "[UNK]" or context[start:end] == token.removeprefix("##")
                position = end


class TestSaved:
    def test_loads_in_a_process_without_this_package(self, trained, tmp_path):
        trained.model_max_length = 8
        trained.save_pretrained(tmp_path / "saved")
        text = "나는 학교에서 ☃한글을 배웠다 Quick"
        code = (
            "import json, sys\n"
            "from transformers import AutoTokenizer\n"
            "tokenizer = AutoTokenizer.from_pretrained('saved')\n"
            "assert 'mixlm' not in sys.modules\n"
            "encoded = tokenizer(sys.argv[1], 'the', return_offsets_mapping=True, truncation=True)\n"
            "print(json.dumps([dict(encoded), tokenizer.model_max_length, tokenizer.is_fast, len(tokenizer)]))\n"
        )
        process = subprocess.run(
            [sys.executable, "-I", "-c", code, text], capture_output=True, text=True, cwd=tmp_path
        )
        assert process.returncode == 0, process.stderr
        encoded, max_length, is_fast, size = json.loads(process.stdout)
        expected = trained(text, "the", return_offsets_mapping=True, truncation=True)
        assert set(encoded) == {"input_ids", "token_type_ids", "attention_mask", "offset_mapping"}
        assert encoded == {key: json.loads(json.dumps(value)) for key, value in expected.items()}
        assert len(encoded["input_ids"]) == max_length == 8
        assert is_fast and size == len(trained)


class TestFromVocab:
    GOOD = [*SPECIAL_TOKENS, "나", "##는", "학교"]

    def write(self, folder: Path, content: bytes | str) -> Path:
        file = folder / "vocab.txt"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    @pytest.mark.parametrize("line_end", ["\n", "\r\n"])
    @pytest.mark.parametrize("mark", ["", "\ufeff"])
    def test_ids_are_line_numbers(self, tmp_path, line_end, mark):
        tokens = ["나", "\u2028", *SPECIAL_TOKENS, "##는"]
        tokenizer = tokenizer_from_vocab(self.write(tmp_path, mark + line_end.join(tokens) + line_end))
        assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == tokens
        assert tokenizer("나는")["input_ids"] == [4, 0, 7, 5]
        assert tokenizer.pad_token_id == 2

    def test_lowercase(self, tmp_path):
        file = self.write(tmp_path, "\n".join([*self.GOOD, "cafe", "café"]))
        assert cut(tokenizer_from_vocab(file, lowercase=True), "CAFÉ") == ["café"]
        assert cut(tokenizer_from_vocab(file), "CAFÉ") == ["[UNK]"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("\n".join([*GOOD, "나", "다"]), "vocab.txt, line 9: '나' is already on line 6"),
            ("\n".join([*GOOD, "", "다"]), "vocab.txt, line 9: empty line"),
            ("[PAD]\n[UNK]\n가\n", r"vocab.txt: no \[CLS\] \[SEP\] \[MASK\] in its 3 lines"),
            ("", "vocab.txt, line 1: empty line"),
            (b"[PAD]\n\xb0\xa1\n", r"vocab.txt: not UTF-8 at byte offset 6 \(0xb0\)"),
        ],
    )
    def test_refused(self, tmp_path, content, message):
        with pytest.raises(UserError, match=message) as error:
            tokenizer_from_vocab(self.write(tmp_path, content))
        assert "\n" not in str(error.value)

    def test_no_such_file(self, tmp_path):
        with pytest.raises(UserError, match="nothing.txt: cannot be read: No such file"):
            tokenizer_from_vocab(tmp_path / "nothing.txt")
        with pytest.raises(UserError, match="cannot be read: Is a directory"):
            tokenizer_from_vocab(tmp_path)


class TestLoad:
    def refused(self, name: str | Path, message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            load_tokenizer(name)
        assert "\n" not in str(error.value)

    def test_round_trip(self, trained, tmp_path):
        trained.save_pretrained(tmp_path)
        assert load_tokenizer(tmp_path).get_vocab() == trained.get_vocab()

    def test_no_such_name(self, tmp_path):
        self.refused(tmp_path / "nowhere", "nowhere: no such folder; check its name$")
        self.refused("~/has-this", "^~/has-this: no such folder; check its name$")
        self.refused("nobody/has-this", "'nobody/has-this': no such folder, and not to be had from the Hub")

    def test_wrong_folder_or_file(self, tmp_path):
        self.refused(tmp_path, "no tokenizer.json in it")
        (tmp_path / "vocab.txt").write_text("[PAD]")
        self.refused(tmp_path, "no tokenizer.json in it; make one: mixlm tokenizer from-vocab .*vocab.txt")
        self.refused(tmp_path / "vocab.txt", "this is a file; give the folder")
        (tmp_path / "tokenizer.json").write_text("{")
        self.refused(tmp_path, "cannot load tokenizer")

    def test_config_without_vocabulary(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        self.refused(tmp_path, "has no vocabulary, only special tokens")

    def test_not_fast(self, tmp_path):
        ByT5Tokenizer().save_pretrained(tmp_path)
        self.refused(tmp_path, "is not a fast one")

    def test_lacks_special_tokens(self, tmp_path):
        backend = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1, "<pad>": 2}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>").save_pretrained(
            tmp_path
        )
        self.refused(tmp_path, "has no cls, sep, mask token")


class TestWordStartTable:
    def test_wordpiece(self, tmp_path):
        file = tmp_path / "vocab.txt"
        file.write_text("\n".join(["##앞", *SPECIAL_TOKENS, "나", "##는", "#"]), encoding="utf-8")
        table = word_start_table(tokenizer_from_vocab(file))
        assert table.dtype == bool
        assert table.tolist() == [False, True, True, True, True, True, True, False, True]

    @pytest.mark.parametrize("mark", ["▁", "Ġ"])
    def test_marked_blanks(self, mark):
        vocabulary = {token: index for index, token in enumerate(["<s>", f"{mark}the", "re", mark, "는"])}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE(vocabulary, [])), cls_token="<s>", additional_special_tokens=["<x>"]
        )
        assert word_start_table(tokenizer).tolist() == [True, True, False, True, False, True]
        tokenizer.add_tokens(["새말"])  # which is no special one
        assert word_start_table(tokenizer).tolist() == [True, True, False, True, False, True, True]

    def test_refused_where_nothing_marks_a_word(self):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])))
        with pytest.raises(UserError, match="does not tell where words begin"):
            word_start_table(tokenizer)


class TestReport:
    CONTEXT = "나는 학교에 간다."
    # Cut by the toy vocabulary as: 나 ##는 학교 ##에 간다 .
    SENTENCES = [CONTEXT, "서울 ☃"]

    @pytest.fixture
    def toy(self, tmp_path) -> PreTrainedTokenizerFast:
        file = tmp_path / "vocab.txt"
        tokens = [*SPECIAL_TOKENS, "나", "##는", "학교", "##에", "간다", ".", "서울"]
        file.write_text("\n".join(tokens), encoding="utf-8")
        return tokenizer_from_vocab(file)

    def squad(self, folder: Path, *questions: dict) -> Path:
        file = folder / "squad.json"
        paragraph = {"context": self.CONTEXT, "qas": list(questions)}
        file.write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}), encoding="utf-8")
        return file

    def question(self, name: str, *answers: tuple[int, str]) -> dict:
        return {
            "id": name,
            "question": "?",
            "answers": [{"answer_start": start, "text": text} for start, text in answers],
        }

    def test_sentences(self, toy):
        report = tokenizer_report(toy, iter(self.SENTENCES))
        assert (report.sentences, report.eojeols, report.characters) == (2, 5, 11)
        assert (report.tokens, report.unknown_tokens) == (8, 1)
        assert report.unk_rate == 1 / 8
        assert report.tokens_per_eojeol == 8 / 5
        assert report.tokens_per_character == 8 / 11
        assert report.answers == 0 and math.isnan(report.em_ceiling)

    def test_answers(self, toy, tmp_path):
        file = self.squad(
            tmp_path,
            self.question("q1", (3, "학교"), (3, "학교"), (3, "학교에"), (4, "교에"), (0, "서울"), (6, "간다")),
            self.question("q2", (3, "학교"), (3, "학교에 간다."), (3, "학교에 ")),
            {"id": "q3", "question": "?", "is_impossible": True, "answers": []},
        )
        # Hit: 학교, 학교에, 간다 (which is found), 학교, 학교에 간다. Missed: 교에, and the one that ends in a blank.
        report = tokenizer_report(toy, [], [file, file])
        assert (report.answers, report.answers_on_token_borders, report.misplaced_answers) == (7, 5, 1)
        assert report.em_ceiling == 5 / 7
        assert math.isnan(report.unk_rate) and math.isnan(report.tokens_per_eojeol)

    def test_blanks_in_tokens_do_not_count(self):
        """A reader leaves them out: what is read from the tokens " quick" and " brown" begins with the q."""
        backend = Tokenizer(models.WordLevel({"The": 0, "Ġquick": 1, "Ġbrown": 2, "Ġfox": 3}, unk_token="The"))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        context = "The quick brown fox"
        hit, missed = Answer("quick brown", 4), Answer("uick brown", 5)
        assert answers_on_token_borders(tokenizer, [(context, hit), (context, missed)]) == {(context, hit)}

    def test_decomposed_hangul_has_the_borders_of_its_syllables(self, toy):
        context = unicodedata.normalize("NFD", "나는 학교에 간다.")
        texts = [unicodedata.normalize("NFD", text) for text in ("학교", "학교에", "교에")]
        answers = [(context, Answer(text, context.index(text))) for text in texts]
        assert answers_on_token_borders(toy, answers) == set(answers[:2])

    def test_special_tokens_in_a_context_are_text(self, toy):
        """As in a reader's windows: "[SEP]" is three tokens, and the one within the brackets can be an answer."""
        context = "나는 [SEP] 간다"
        answers = [(context, Answer("SEP", 4)), (context, Answer("[SEP]", 3))]
        assert answers_on_token_borders(toy, answers) == set(answers)

    def test_truncation_and_padding_of_the_tokenizer_do_not_count(self, toy, tmp_path):
        file = self.squad(tmp_path, self.question("q", (7, "간다")))
        expected = tokenizer_report(toy, self.SENTENCES, [file])
        toy.backend_tokenizer.enable_truncation(2)
        toy.backend_tokenizer.enable_padding(length=64)
        assert tokenizer_report(toy, self.SENTENCES, [file]) == expected
        assert expected.answers_on_token_borders == 1
        assert toy.backend_tokenizer.truncation is not None

    def test_more_sentences_than_one_batch(self, toy):
        report = tokenizer_report(toy, self.SENTENCES * 1001)
        assert (report.sentences, report.tokens, report.unknown_tokens) == (2002, 8008, 1001)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'{"data":\n [}', "squad.json, line 2, column 3: not JSON"),
            (b'{"data": [{"paragraphs": []}, {"paragraphs": [{"qas": []}]}]}', r"data\[1\].paragraphs\[0\].context"),
        ],
    )
    def test_refused(self, toy, tmp_path, content, message):
        file = tmp_path / "squad.json"
        file.write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            tokenizer_report(toy, [], [file])
        assert "\n" not in str(error.value)
