"""Answering questions in Python and on the command line."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering

import mixlm
from mixlm import cli
from mixlm.errors import UserError
from mixlm.reader import Decoding, MixLMReader, ReadAnswer
from mixlm.tokenization import load_tokenizer, train_tokenizer

CONTEXT = "그는 서울에서 태어났다. 나중에 부산에서 살았다. " * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reader whose head is random, for windows that are much shorter than the text."""
    folder = tmp_path_factory.mktemp("reader")
    tokenizer = train_tokenizer([CONTEXT, "태어난 곳은? 살던 곳은?"] * 3, 200, show_progress=False)
    config = mixlm.MixLMConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, n_experts=2, num_heads=2, kernel_size=5,
        ff_dim=64, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    mixlm.MixLMForQuestionAnswering(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Decoding(max_seq_length=32, doc_stride=8, max_query_length=8, max_answer_length=5).save(folder)
    return folder


def test_an_answer_is_a_place_in_its_context(folder):
    reader = MixLMReader.from_pretrained(folder, device="cpu")
    for answer in reader.answers(["태어난 곳은?", "살던 곳은?"], [CONTEXT, CONTEXT[30:]]):
        assert answer.text and 0 < answer.score <= 1 and answer.null_odds is None
    answer = reader.answer("태어난 곳은?", CONTEXT)
    assert CONTEXT[answer.start : answer.end] == answer.text


def test_the_batch_size_and_the_company_change_nothing(folder):
    questions, contexts = ["태어난 곳은?", "살던 곳은?", "태어난 곳은?"], [CONTEXT, CONTEXT[:40], CONTEXT[30:]]
    together = MixLMReader.from_pretrained(folder, device="cpu").answers(questions, contexts)
    alone = MixLMReader.from_pretrained(folder, device="cpu", batch_size=1)
    for question, context, expected in zip(questions, contexts, together, strict=True):
        found = alone.answer(question, context)
        assert found[:3] == expected[:3] and found.score == pytest.approx(expected.score, abs=1e-5)


def test_a_reader_for_unanswerable_questions_gives_no_answer_above_its_threshold(folder, tmp_path):
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    tokenizer = MixLMReader.from_pretrained(folder).tokenizer
    odds = MixLMReader(model, tokenizer, Decoding(32, 8, 8, unanswerable=True, null_threshold=1e9)).answer(
        "태어난 곳은?", CONTEXT
    )
    assert odds.text and odds.null_odds is not None
    for threshold, is_answered in ((odds.null_odds - 0.01, False), (odds.null_odds + 0.01, True)):
        decoding = Decoding(32, 8, 8, unanswerable=True, null_threshold=threshold)
        decoding.save(tmp_path)
        found = MixLMReader(model, tokenizer, Decoding.load(tmp_path)).answer("태어난 곳은?", CONTEXT)
        assert bool(found.text) == is_answered and 0 < found.score < 1


def test_questions_and_contexts_come_in_pairs(folder):
    with pytest.raises(ValueError, match="2 questions and 1 contexts"):
        MixLMReader.from_pretrained(folder).answers(["a", "b"], [CONTEXT])


def test_the_command_line_answers_one_and_many(folder, tmp_path, capsys):
    expected = MixLMReader.from_pretrained(folder).answer("태어난 곳은?", CONTEXT)
    cli.main(["read", "--model", str(folder), "--question", "태어난 곳은?", "--context", CONTEXT])
    assert capsys.readouterr().out.startswith(f"{expected.text}  {expected.score:.1%}  characters {expected.start} to")
    file = tmp_path / "questions.jsonl"
    rows = [{"id": str(number), "question": "태어난 곳은?", "context": CONTEXT} for number in range(3)]
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    cli.main(["read", "--model", str(folder), "--file", str(file), "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["id"] for line in lines] == ["0", "1", "2"]
    for line in lines:
        assert (line["text"], line["start"], line["end"]) == expected[:3]


def test_a_byte_order_mark_is_no_text(folder, tmp_path, capsys):
    said = []
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "context.txt").write_text(CONTEXT, encoding)
        flags = ["--question", "태어난 곳은?", "--context_file", str(tmp_path / "context.txt")]
        cli.main(["read", "--model", str(folder), *flags])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_an_answer_is_a_place_in_the_file_and_takes_one_line(folder, tmp_path, capsys, monkeypatch):
    context = "옛날\r\n서울\r\n부산"
    (tmp_path / "context.txt").write_bytes(context.encode())
    (tmp_path / "asked.jsonl").write_text(
        "\n".join(json.dumps({"id": name, "question": "어디?", "context": context}) for name in "ab")
    )
    monkeypatch.setattr(
        MixLMReader,
        "answers",
        lambda self, questions, contexts: [ReadAnswer(each[4:10], 4, 10, 1.0, None) for each in contexts],
    )
    one = ["read", "--model", str(folder), "--question", "어디?", "--context_file", str(tmp_path / "context.txt")]
    cli.main(one)
    assert capsys.readouterr().out == "서울 부산  100.0%  characters 4 to 10\n"
    cli.main([*one, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == "서울\r\n부산" == context[found["start"] : found["end"]]
    cli.main(["read", "--model", str(folder), "--file", str(tmp_path / "asked.jsonl")])
    assert capsys.readouterr().out == "a  서울 부산  100.0%\nb  서울 부산  100.0%\n"


@pytest.mark.parametrize("answers", [{}, {"answers": []}, {"answers": {"text": [""], "answer_start": [-1]}}])
def test_what_is_only_asked_needs_no_answers(folder, tmp_path, capsys, answers):
    """Also where a file hides them."""
    row = {"id": "q", "question": "태어난 곳은?", "context": CONTEXT, "is_impossible": False, **answers}
    (tmp_path / "asked.jsonl").write_text(json.dumps(row))
    cli.main(["read", "--model", str(folder), "--file", str(tmp_path / "asked.jsonl")])
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder):
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["새말"])
    with pytest.raises(UserError, match=r"knows \d+ tokens, and the tokenizer .* has \d+"):
        MixLMReader.from_pretrained(folder, tokenizer=tokenizer)


def test_particles_are_dropped_where_the_decoding_or_the_command_line_says_so(folder, tmp_path, capsys, monkeypatch):
    # Whatever the random model likes: from the first word to the last of one that has a particle.
    monkeypatch.setattr(
        "mixlm.reader.scores_by_window",
        lambda model, device, windows, rows, pad_token_id: (
            (number, *scores_of(windows.windows_of(0)[number], int(windows.lengths[number])))
            for number in range(len(windows))
        ),
    )
    context = "서울에서 태어났다."
    reader = MixLMReader.from_pretrained(folder)
    assert reader.answer("태어난 곳은?", context)[:3] == ("서울에서", 0, 4)
    reader.decoding = replace(reader.decoding, korean_particles=True)
    assert reader.answer("태어난 곳은?", context)[:3] == ("서울", 0, 2)
    reader.decoding.save(tmp_path)
    assert Decoding.load(tmp_path) == reader.decoding
    for flags, expected in (([], "서울에서"), (["--korean_particles"], "서울")):
        cli.main(["read", "--model", str(folder), "--question", "태어난 곳은?", "--context", context, *flags])
        assert capsys.readouterr().out.startswith(f"{expected}  ")


def scores_of(window, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are for the first four characters of the context."""
    starts, ends = np.zeros(length), np.zeros(length)
    starts[window.context_position] = 9
    ends[window.context_position + np.flatnonzero(window.offsets[:, 1] == 4)] = 9
    return starts, ends


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--question", "x"], "one of the arguments --context"),
        (["--context", "x"], "give --question with --context"),
        (["--question", "x", "--file", "y"], "give --question with --context"),
        (["--question", " ", "--context", "x"], "--question: is empty; ask something"),
        (["--question", "x", "--context_file", "nowhere"], "--context_file nowhere: cannot be read"),
        (["--question", "x", "--context", ""], "--context or --context_file: is empty"),
        (["--question", "\udcff", "--context", "x"], "--question: character 0 is no text"),
        (["--question", "x", "--context", "y\udcff"], "--context: character 1 is no text"),
        (["--file", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--file", "empty.json"], "--file empty.json: no questions in it"),
        (["--file", "blank.jsonl"], "blank.jsonl: question 'q2' is empty; ask something, or remove it"),
        (["--question", "x", "--context", "y", "--batch_size", "0"], "--batch_size 0: must be 1 or more"),
    ],
)
def test_what_is_wrong_is_one_line(folder, flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.json").write_text('{"data": []}')
    rows = [{"id": f"q{number}", "question": text, "context": CONTEXT} for number, text in ((1, "어디?"), (2, " "))]
    (tmp_path / "blank.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit) as ended:
        cli.main(["read", "--model", str(folder), *flags])
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert message in said


def test_a_model_that_was_not_trained_to_read_is_refused(folder, tmp_path):
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    mixlm.MixLMForMaskedLM(model.config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is not trained to answer questions; train it with run_mrc.py"):
        MixLMReader.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"max_seq_length": "384"}, "max_seq_length is '384', and no int"),
        ({"doc_stride": True}, "doc_stride is True, and no int"),
        ({"max_answer_length": 0}, "max_answer_length is 0, and below 1"),
        ({"unanswerable": 1}, "unanswerable is 1, and no bool"),
        ({"null_threshold": None}, "null_threshold is None, and no float"),
        ({"unknown": 1}, "unexpected keyword argument 'unknown'"),
        ([], "max_seq_length is None, and no int"),
    ],
)
def test_settings_of_other_kinds_are_refused_where_they_are_read(tmp_path, values, problem):
    (tmp_path / "reader.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"reader.json: is not what run_mrc.py writes: .*{problem}"):
        Decoding.load(tmp_path)
    (tmp_path / "reader.json").write_text('{"null_threshold": 1}')
    assert Decoding.load(tmp_path) == Decoding(null_threshold=1)
