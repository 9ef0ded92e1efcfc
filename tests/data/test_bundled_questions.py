"""The questions beside the bundled corpus are SQuAD files about its articles, and exact."""

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

import mixlm
from mixlm.data.corpus import read_documents

SAMPLE = Path(mixlm.__file__).parent / "sample"
LANGUAGES = ("ko", "en")
V1_FILES = {language: f"{language}_questions.json" for language in LANGUAGES}
V2_FILE = "questions_v2.json"
FILES = (*V1_FILES.values(), V2_FILE)


class Question(NamedTuple):
    title: str
    context: str
    fields: dict

    @property
    def language(self) -> str:
        return self.fields["id"].removeprefix("v2-")[:2]

    @property
    def article(self) -> str:
        return self.fields["id"].removeprefix("v2-").rpartition("-")[0]


def load(name: str) -> dict:
    return json.loads((SAMPLE / name).read_text("utf-8"))


def questions(*names: str) -> list[Question]:
    return [
        Question(article["title"], paragraph["context"], question)
        for name in names
        for article in load(name)["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def articles(language: str) -> list[str]:
    files = sorted(SAMPLE.glob(f"{language}_*.dat"))
    return [" ".join(document.sentences) for file in files for document in read_documents(file)]


def is_impossible(question: Question) -> bool:
    return question.fields["is_impossible"]


def occurring_twice(values) -> list:
    return [value for value, count in Counter(values).items() if count > 1]


@pytest.mark.parametrize(("language", "least"), [("ko", 240), ("en", 48)])
def test_every_article_has_about_four_questions(language, least):
    found = questions(V1_FILES[language])
    assert len(found) >= least
    per_article = Counter(question.context for question in found)
    assert set(per_article) == set(articles(language))
    assert min(per_article.values()) >= 4


def test_the_v2_file_has_questions_with_and_without_an_answer():
    found = questions(V2_FILE)
    counts = Counter((question.language, is_impossible(question)) for question in found)
    assert counts["ko", True] >= 40
    assert all(counts[language, impossible] for language in LANGUAGES for impossible in (False, True))


@pytest.mark.parametrize("name", FILES)
def test_answers_are_the_text_at_their_start(name):
    for question in questions(name):
        for answer in question.fields["answers"]:
            start, text = answer["answer_start"], answer["text"]
            assert set(answer) == {"text", "answer_start"}
            assert question.context[start : start + len(text)] == text, question.fields["id"]
            assert text and text == text.strip(" .,?"), question.fields["id"]


@pytest.mark.parametrize("name", V1_FILES.values())
def test_v1_questions_have_one_answer_and_only_the_fields_of_v1(name):
    assert load(name)["version"] == "1.1"
    for question in questions(name):
        assert set(question.fields) == {"id", "question", "answers"}
        assert len(question.fields["answers"]) == 1, question.fields["id"]


def test_v2_questions_say_whether_they_have_an_answer():
    assert load(V2_FILE)["version"] == "v2.0"
    for question in questions(V2_FILE):
        assert set(question.fields) == {"id", "question", "answers", "is_impossible"}
        assert type(is_impossible(question)) is bool
        assert len(question.fields["answers"]) == (0 if is_impossible(question) else 1), question.fields["id"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_contexts_are_the_articles_of_the_language_and_each_has_one_number(language):
    found = {(question.article, question.context) for question in questions(*FILES) if question.language == language}
    assert {context for _, context in found} == set(articles(language))
    assert occurring_twice(number for number, _ in found) == []
    assert occurring_twice(context for _, context in found) == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_v1_file_has_one_language(language):
    assert {question.language for question in questions(V1_FILES[language])} == {language}


def test_ids_are_unique_and_readable():
    ids = [question.fields["id"] for question in questions(*FILES)]
    assert occurring_twice(ids) == []
    for name in FILES:
        prefix = "v2-" if name == V2_FILE else ""
        numbers = Counter()
        for question in questions(name):
            numbers[question.article] += 1
            assert re.fullmatch(r"(ko|en)-\d{3}", question.article)
            assert question.fields["id"] == f"{prefix}{question.article}-{numbers[question.article]}"


def test_no_question_is_asked_twice():
    asked = ["".join(question.fields["question"].lower().split()) for question in questions(*FILES)]
    assert occurring_twice(asked) == []


def test_a_title_belongs_to_one_article():
    titled = {(question.title, question.context) for question in questions(*FILES)}
    assert occurring_twice(title for title, _ in titled) == []
    assert occurring_twice(context for _, context in titled) == []


def test_questions_are_questions_that_do_not_give_the_answer_away():
    for question in questions(*FILES):
        text = question.fields["question"]
        assert text.endswith("?") and text == text.strip() and "  " not in text
        assert text.isprintable() and unicodedata.is_normalized("NFC", text)
        assert all(answer["text"] not in text for answer in question.fields["answers"]), question.fields["id"]
        is_korean = any("가" <= character <= "힣" for character in text)
        assert is_korean == (question.language == "ko"), question.fields["id"]
