import gzip
import json
import lzma
import unicodedata

import pytest
from datasets import Dataset

from mixlm.data.squad import (
    NEARBY,
    Answer,
    ReadingExample,
    count_unanswerable,
    read_rows,
    read_squad,
    reading_files,
    select_articles,
    split_by_article,
)
from mixlm.errors import UserError

CONTEXT = "서울은 대한민국의 수도이다. 서울의 인구는 많다."


def question(name, *answers, **more):
    found = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": name, "question": f"{name}?", "answers": found, **more}


def paragraph(*questions, context=CONTEXT):
    return {"context": context, "qas": list(questions)}


def squad(*articles):
    """SQuAD-style JSON: each article is a list of paragraphs."""
    return {"data": [{"title": f"글 {number}", "paragraphs": list(each)} for number, each in enumerate(articles)]}


def row(name, title, *answers, context=CONTEXT):
    texts, starts = [text for text, _ in answers], [start for _, start in answers]
    return {
        "id": name,
        "title": title,
        "context": context,
        "question": f"{name}?",
        "answers": {"text": texts, "answer_start": starts},
    }


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wb") as file:
        file.write(text.encode())
    return path


def write_lines(path, *rows):
    return write(path, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows))


def refused(read, *arguments):
    with pytest.raises(UserError) as caught:
        read(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


SMALL = squad(
    [paragraph(question("q0", ("서울", 0), ("서울은", 0)), question("q1", ("수도", 10)))],
    [paragraph(question("q2", ("인구", 20)), context=CONTEXT), paragraph(question("q3", ("b", 1)), context="abc")],
)


class TestForms:
    def test_squad(self, tmp_path):
        data = read_squad(write(tmp_path / "dev.json", SMALL))
        assert data.skipped == [] and data.repaired_answers == 0
        assert data.examples[0] == ReadingExample(
            id="q0",
            title="글 0",
            context=CONTEXT,
            question="q0?",
            answers=(Answer("서울", 0), Answer("서울은", 0)),
            answer_texts=("서울", "서울은"),
            is_impossible=False,
            article=0,
        )
        assert [(example.id, example.article) for example in data.examples] == [
            ("q0", 0),
            ("q1", 0),
            ("q2", 1),
            ("q3", 1),
        ]
        assert data.examples[3].answers == (Answer("b", 1),) and data.examples[3].answers[0].end == 2

    @pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.json.xz"])
    def test_compression_and_a_byte_order_mark_change_nothing(self, tmp_path, name):
        expected = read_squad(write(tmp_path / "plain.json", SMALL))
        file = write(tmp_path / name, "\ufeff" + json.dumps(SMALL))
        assert read_squad(file) == read_squad(str(file)) == expected

    @pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz"])
    def test_lines(self, tmp_path, name):
        # A raw U+2028 in a text is no end of a line; rows of a title need not stand together.
        context = "a\u2028b"
        rows = [row("q0", "A", ("a", 0), context=context), row("q1", "B", ("서울", 0)), row("q2", "A", ("수도", 10))]
        data = read_squad(write_lines(tmp_path / name, *rows))
        assert [(example.id, example.article, example.title) for example in data.examples] == [
            ("q0", 0, "A"),
            ("q1", 1, "B"),
            ("q2", 0, "A"),
        ]
        assert data.examples[0].context == context
        assert data.examples[2].answers == (Answer("수도", 10),)

    def test_rows_of_a_dataset(self):
        rows = [row("q0", "A", ("서울", 0)), row("q1", "A"), row("q2", "B", ("수도", 10), ("대한민국의 수도", 4))]
        data = read_rows(Dataset.from_list(rows), "local")
        assert data == read_rows(rows, "local")
        assert [example.is_impossible for example in data.examples] == [False, True, False]
        assert [example.article for example in data.examples] == [0, 0, 1]
        assert len(data.examples[2].answers) == 2

    def test_rows_with_a_list_of_answers(self):
        rows = [{**row("q0", "A"), "answers": [{"text": "수도", "answer_start": 10}]}]
        assert read_rows(rows, "local").examples[0].answers == (Answer("수도", 10),)

    def test_articles_are_counted_over_all_files(self, tmp_path):
        write(tmp_path / "b" / "2.json", squad([paragraph(question("q4", ("서울", 0)))]))
        write(tmp_path / "b" / "1.json.xz", SMALL)
        write(tmp_path / ".hidden" / "3.json", "not read")
        write(tmp_path / "b" / "notes.txt", "not read")
        lines = write_lines(tmp_path / "lines.jsonl", row("q5", "A", ("서울", 0)), row("q6", "B", ("서울", 0)))
        assert [file.name for file in reading_files(tmp_path)] == ["1.json.xz", "2.json", "lines.jsonl"]
        whole = read_squad(tmp_path).examples
        assert [example.id for example in whole] == [f"q{number}" for number in range(7)]
        assert [example.article for example in whole] == [0, 0, 1, 1, 2, 3, 4]
        assert read_squad([tmp_path / "b", lines]).examples == whole

    def test_titles_are_optional_and_ids_may_be_numbers(self, tmp_path):
        document = {"version": "x", "data": [{"paragraphs": [paragraph(question(7, ("서울", 0)))]}]}
        (example,) = read_squad(write(tmp_path / "a.json", document)).examples
        assert (example.id, example.title) == ("7", "")

    def test_unanswerable_questions(self, tmp_path):
        document = squad(
            [
                paragraph(
                    question("yes", ("서울", 0), is_impossible=False),
                    question("no", is_impossible=True, plausible_answers=[{"text": "x", "answer_start": 0}]),
                    question("plausible", ("수도", 10), is_impossible=True),
                    {"id": "short", "question": "?", "is_impossible": True},
                    question("unsaid"),
                )
            ]
        )
        examples = read_squad(write(tmp_path / "a.json", document)).examples
        assert [example.is_impossible for example in examples] == [False, True, True, True, True]
        assert [example.answers for example in examples[1:]] == [()] * 4
        assert count_unanswerable(examples) == 4
        assert count_unanswerable(examples[:1]) == 0


class TestAnswersElsewhere:
    def read(self, context, *answers):
        rows = [row("q", "A", *answers, context=context), row("good", "A", ("서울", 0))]
        data = read_rows(rows, "rows")
        for example in data.examples:
            assert all(example.context[each.start : each.end] == each.text for each in example.answers)
        return data

    def test_once_nearby(self):
        context = "x" * NEARBY + "답" + "x" * 100 + "답"
        for start in (0, NEARBY + 1, 2 * NEARBY):
            data = self.read(context, ("답", start))
            assert data.examples[0].answers == (Answer("답", NEARBY),)
            assert data.repaired_answers == 1 and not data.skipped

    def test_offsets_in_utf16(self):
        context = "😀😀 이 답이 답이다"
        data = self.read(context, ("답이다", context.index("답이다") + 2))
        assert data.examples[0].answers == (Answer("답이다", context.index("답이다")),)

    @pytest.mark.parametrize(
        ("context", "start", "reason"),
        [
            ("답 x 답", 2, "of 2 elsewhere none is clearly meant"),  # both are near
            ("답" + "x" * 100 + "답", 50, "of 2 elsewhere none is clearly meant"),  # both are far
            ("답" + "x" * NEARBY + "x", NEARBY + 1, "of 1 elsewhere none is clearly meant"),  # the only one is far
            ("nothing", 2, "it is nowhere"),
            (unicodedata.normalize("NFD", "그 답 하나"), 2, "it is nowhere"),  # contexts are not composed
        ],
    )
    def test_skipped_and_told(self, context, start, reason):
        data = self.read(context, ("답", start))
        (skipped,) = data.skipped
        assert skipped.id == "q" and "'답' is not at" in skipped.reason and reason in skipped.reason
        example = data.examples[0]
        assert example.answers == () and example.answer_texts == ("답",) and not example.is_impossible
        assert data.repaired_answers == 0

    def test_the_other_answers_are_kept(self):
        data = self.read(CONTEXT, ("부산", 0), ("수도", 10))
        assert data.examples[0].answers == (Answer("수도", 10),)
        assert data.examples[0].answer_texts == ("부산", "수도")
        assert len(data.skipped) == 1

    @pytest.mark.parametrize(
        "text", ["\u200e답", "답\u00a0", "e\u0301", unicodedata.normalize("NFD", "한글"), "👨‍👩‍👧", " 답 "]
    )
    def test_text_is_never_normalized(self, text):
        context = f"앞{text}뒤"
        data = self.read(context, (text, 1))
        assert data.examples[0].context == context
        assert data.examples[0].answers == (Answer(text, 1),)


class TestRefused:
    def test_paths(self, tmp_path):
        assert "no such file" in refused(read_squad, tmp_path / "absent")
        assert "no file of questions" in refused(read_squad, tmp_path)
        assert ".jsonl" in refused(read_squad, write(tmp_path / "a.csv", "x"))

    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ('{"data":\n  [}', ("line 2, column 4", "not JSON")),
            ('{"data": [', ("line 1, column 11", "is the file whole?")),
            ("", ("line 1, column 1", "not JSON")),
            ('{"id": 1}\n{"id": 2}', ("line 2, column 1", "name it .jsonl")),
            ("[]", ("no list 'data'",)),
            ('{"data": 3}', ("no list 'data'",)),
        ],
    )
    def test_not_a_document(self, tmp_path, text, parts):
        file = write(tmp_path / "a.json", text)
        message = refused(read_squad, file)
        assert message.startswith(str(file)) and all(part in message for part in parts), message

    def test_not_lines(self, tmp_path):
        file = tmp_path / "a.jsonl"
        good = json.dumps(row("q", "A", ("서울", 0)))
        assert f"{file}, line 3, column 7: not JSON" in refused(read_squad, write(file, f'{good}\n\n{{"id":'))
        assert f"{file}, line 2: found [] where an object is wanted" in refused(read_squad, write(file, f"{good}\n[]"))

    def test_not_utf8(self, tmp_path):
        file = tmp_path / "a.json"
        file.write_bytes(b'{"data":\n"\xff"}')
        assert "line 2: byte 0xff at offset 10 of the text is not UTF-8" in refused(read_squad, file)

    @pytest.mark.parametrize(("name", "damage"), [("a.json.gz", "truncated"), ("a.json.xz", "truncated")])
    def test_damaged(self, tmp_path, name, damage):
        file = write(tmp_path / name, SMALL)
        file.write_bytes(file.read_bytes()[:-20])
        assert damage in refused(read_squad, file)
        file.write_bytes(b"no archive")
        assert damage in refused(read_squad, file)

    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [
            (("data", 1, "paragraphs", 1, "qas", 0, "id"), None, "data[1].paragraphs[1].qas[0].id is missing"),
            (("data", 0, "paragraphs", 0, "context"), None, "data[0].paragraphs[0].context is missing"),
            (("data", 0, "paragraphs"), None, "data[0].paragraphs is missing (found there: title)"),
            (
                ("data", 0, "paragraphs", 0, "qas", 1, "answers"),
                None,
                "data[0].paragraphs[0].qas[1].answers is missing",
            ),
            (("data", 0, "paragraphs", 0, "qas", 1, "question"), None, "qas[1].question is missing"),
            (("data", 0, "paragraphs", 0, "qas", 0, "answers", 1, "text"), None, "qas[0].answers[1].text is missing"),
            (("data", 0, "paragraphs", 0, "qas"), {}, "paragraphs[0].qas: found {} where a list is wanted"),
            (("data", 0), "x", "data[0]: found 'x' where an object is wanted"),
            (("data", 0, "paragraphs", 0, "qas", 0, "id"), 1.5, "qas[0].id: found 1.5 where a whole number is wanted"),
            (
                ("data", 0, "paragraphs", 0, "qas", 0, "answers", 0, "answer_start"),
                "0",
                "answers[0].answer_start: found '0' where a whole number is wanted",
            ),
            (
                ("data", 0, "paragraphs", 0, "qas", 0, "answers", 0, "answer_start"),
                True,
                "answers[0].answer_start: found True where a whole number is wanted",
            ),
            (
                ("data", 0, "paragraphs", 0, "qas", 0, "answers", 0, "answer_start"),
                len(CONTEXT),
                f"answers[0].answer_start: {len(CONTEXT)} is outside the context of {len(CONTEXT)} characters",
            ),
            (("data", 0, "paragraphs", 0, "qas", 0, "answers", 0, "answer_start"), -1, "-1 is outside the context"),
            (("data", 0, "paragraphs", 0, "qas", 0, "answers", 0, "text"), " ", "answers[0].text: an empty answer"),
            (("data", 0, "paragraphs", 0, "context"), " \n", "data[0].paragraphs[0].context: an empty context"),
            (("data", 0, "paragraphs", 0, "context"), "a\ud83d", "context: character 1 is half of a surrogate pair"),
            (("data", 0, "paragraphs", 0, "qas", 0, "is_impossible"), "no", "is_impossible: found 'no' where true or"),
            (
                ("data", 1, "paragraphs", 1, "qas", 0, "id"),
                "q1",
                "data[1].paragraphs[1].qas[0].id: 'q1' is the id of another question too",
            ),
        ],
    )
    def test_wrong_values(self, tmp_path, place, value, message):
        document = json.loads(json.dumps(SMALL))
        *path, last = place
        parent = document
        for key in path:
            parent = parent[key]
        if value is None:
            del parent[last]
        else:
            parent[last] = value
        file = write(tmp_path / "a.json", json.dumps(document))
        found = refused(read_squad, file)
        assert found.startswith(str(file)) and message in found, found

    def test_an_id_twice_is_named_with_both_places(self, tmp_path):
        first = write(tmp_path / "1.json", squad([paragraph(question("q", ("서울", 0)))]))
        second = write_lines(tmp_path / "2.jsonl", row("q", "A", ("서울", 0)))
        message = refused(read_squad, [first, second])
        assert f"{second}, line 1: id: 'q'" in message and f"{first}: data[0].paragraphs[0].qas[0].id" in message

    def test_answerable_without_an_answer(self):
        message = refused(read_rows, [{**row("q", "A"), "is_impossible": False}], "rows")
        assert "rows, row 0: answers: no answer although is_impossible is false" in message

    def test_rows(self):
        bad = row("q", "A", ("서울", 0))
        del bad["question"]
        assert "rows, row 0: question is missing" in refused(read_rows, [bad], "rows")
        bad = row("q", "A", ("서울", 0))
        bad["answers"]["text"].append("수도")
        assert "answers: 2 text and 1 answer_start" in refused(read_rows, [bad], "rows")

    def test_questions_that_are_only_asked_need_no_answers(self, tmp_path):
        file = write_lines(tmp_path / "a.jsonl", {"id": "q", "question": "어디?", "context": "서울"})
        (found,) = read_squad(file, to_learn_from=False).examples
        assert (found.id, found.question, found.context, found.answers) == ("q", "어디?", "서울", ())
        assert "answers is missing" in refused(read_squad, file)

    def test_no_answer_at_all(self, tmp_path):
        file = write(
            tmp_path / "a.json", squad([paragraph(question("q", is_impossible=True), question("r", ("없다", 0)))])
        )
        assert "none of the 2 questions has an answer" in refused(read_squad, file)
        assert "none of the 0 questions" in refused(read_rows, [], "rows")


class TestArticles:
    @pytest.fixture
    def examples(self):
        return read_rows([row(f"q{number}", str(number // 3), ("서울", 0)) for number in range(60)], "rows").examples

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("0:5", range(5)),
            ("18:", (18, 19)),
            (":2", (0, 1)),
            ("-2:", (18, 19)),
            (":-18", (0, 1)),
            (" 3 : 4 ", (3,)),
            (":", range(20)),
            ("15:1000", range(15, 20)),
        ],
    )
    def test_ranges(self, examples, text, expected):
        selected = select_articles(examples, text)
        assert selected == [example for example in examples if example.article in expected]
        assert len(selected) == 3 * len(expected)

    @pytest.mark.parametrize("text", ["", "5", "a:b", "0:10:2", "1.5:2", "0-10", "0:1 1", "٣:٤"])
    def test_no_range(self, examples, text):
        message = refused(select_articles, examples, text)
        assert "0:110" in message and "--articles=-30:" in message

    @pytest.mark.parametrize("text", ["20:", "5:5", "6:5", ":-20", "100:200"])
    def test_empty_range(self, examples, text):
        assert "articles 0 to 19" in refused(select_articles, examples, text)

    @pytest.mark.parametrize(("share", "expected"), [(0.1, 2), (0.25, 5), (0.001, 1), (0.999, 19)])
    def test_split(self, examples, share, expected):
        rest, held_out = split_by_article(examples, share, seed=3)
        held_articles = {example.article for example in held_out}
        assert len(held_articles) == expected and len(held_out) == 3 * expected
        assert not held_articles & {example.article for example in rest}
        assert sorted(rest + held_out, key=examples.index) == examples
        assert split_by_article(examples, share, seed=3) == (rest, held_out)

    def test_the_seed_chooses(self, examples):
        assert len({split_by_article(examples, 0.2, seed)[1][0].id for seed in range(10)}) > 1

    def test_no_split(self, examples):
        for share in (0, 1, -0.5, 2):
            assert "between 0 and 1" in refused(split_by_article, examples, share, 0)
        assert "1 article(s)" in refused(split_by_article, examples[:3], 0.5, 0)


@pytest.mark.parametrize(
    ("name", "articles", "questions", "unanswerable"),
    [("KorQuAD_v1.0_dev", 140, 5774, 0), ("squad2_part", 8, 2805, 1527), ("tydiqa_en_dev", 343, 375, 0)],
)
def test_real_files(real_data, name, articles, questions, unanswerable):
    data = read_squad(real_data / "mrc" / f"{name}.json")
    assert len(data.examples) == questions and data.examples[-1].article == articles - 1
    assert count_unanswerable(data.examples) == unanswerable
    assert data.skipped == [] and data.repaired_answers == 0
    for example in data.examples:
        assert all(example.context[each.start : each.end] == each.text for each in example.answers)
    assert {example.article for example in select_articles(data.examples, "3:8")} == set(range(3, 8))
