"""Korean and English are told apart, and nothing else is taken for them."""

import gzip
import json

import pytest

from mixlm.data.corpus import corpus_files
from mixlm.data.languages import languages_of, samples_of

KOREAN = "제주도는 우리나라에서 가장 큰 섬으로, 한반도 남쪽 바다에 있다. 2006년에 특별자치도가 되었다."
ENGLISH = "Jeju is the largest island of Korea, and it lies in the sea to the south of the peninsula."
GERMAN = "Jeju ist die größte Insel von Korea und liegt im Meer südlich der Halbinsel."


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([KOREAN], ["ko"]),
        ([ENGLISH], ["en"]),
        ([ENGLISH, KOREAN], ["ko", "en"]),
        ([GERMAN], []),
        (["한국어 text with the words of English in it"], ["ko", "en"]),
        ([KOREAN + " Transformer BERT API JSON HTTP"], ["ko"]),
        (["12345 --- "], []),
        ([], []),
    ],
)
def test_languages_of(texts, expected):
    assert languages_of(texts) == expected


@pytest.mark.parametrize(("text", "expected"), [(KOREAN, ["ko"]), (ENGLISH, ["en"])])
@pytest.mark.parametrize("escapes", [True, False])
def test_the_keys_of_a_json_file_are_no_english(tmp_path, text, expected, escapes):
    qas = [{"id": "1", "question": text, "is_impossible": True, "answers": [{"text": "", "answer_start": 0}]}]
    data = {"data": [{"title": "", "paragraphs": [{"context": text, "qas": qas * 3}]}]}
    with gzip.open(tmp_path / "a.json.gz", "wt", encoding="utf-8") as stream:
        json.dump(data, stream, ensure_ascii=escapes)
    assert languages_of(samples_of([tmp_path / "a.json.gz"])) == expected


def test_of_many_files_some_are_read_from_the_first_to_the_last_ones(tmp_path):
    for number in range(1, 220):
        (tmp_path / f"{number:03}.dat").write_text(str(number), "utf-8")
    numbers = [int(sample) for sample in samples_of(corpus_files(tmp_path))]
    assert len(numbers) <= 50 and numbers[0] == 1 and numbers[-1] > 210
