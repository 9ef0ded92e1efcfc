"""The page and the interface for programs: what they say, over HTTP, and of many at the same time."""

import html
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from itertools import islice

import psutil
import pytest
from answering import StubReader, save_reader
from local_server import running
from remote_models import tiny_model, tiny_tokenizer

import mixlm
from mixlm import serving
from mixlm.cli import main
from mixlm.data.passages import Passage
from mixlm.encoder import Encoding, MixLMEncoder
from mixlm.open_qa import OpenQA
from mixlm.reader import MixLMReader
from mixlm.retrieval.analysers import BigramAnalyser
from mixlm.retrieval.index import build_index, open_index
from mixlm.retrieval.search import CANDIDATES, Search
from mixlm.retrieval.shards import ShardedIndex
from mixlm.retrieval.vectors import StoredVectors, encode_passages
from mixlm.serving import ENGLISH, KOREAN, LARGEST_BODY, build_app, problem_of, result_html, result_of

PASSAGES = [
    Passage("hangul", "한글", "한글은 1443년에 만들어졌다."),
    Passage("day", "", "한글날은 10월 9일이다."),
    Passage("seoul", "서울", "서울은 한국의 수도이다. 한국은 넓다."),
    Passage("evil", "<script>alert(1)</script>", "한국의 <b>7</b> & <img src=x onerror=alert(1)> ${1} {{title}}"),
]
QUESTIONS = ["한글은 언제 만들어졌나?", "한국의 수도는?", "한글날은?", "서울은 넓은가?", "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An index with vectors, one without, and the retriever and reader that belong to them."""
    folder = tmp_path_factory.mktemp("serving")
    tiny_model(mixlm.MixLMForRetrieval).save_pretrained(folder / "retriever")
    tiny_tokenizer().save_pretrained(folder / "retriever")
    Encoding(max_query_length=16, max_passage_length=32).save(folder / "retriever")
    save_reader(folder / "reader", [f"{passage.title} {passage.text}" for passage in PASSAGES] + QUESTIONS)
    encode_passages(PASSAGES, str(folder / "retriever"), folder / "vectors")
    build_index(PASSAGES, folder / "index", BigramAnalyser(), StoredVectors(folder / "vectors"))
    build_index(PASSAGES, folder / "lexical", BigramAnalyser())
    return folder


@pytest.fixture(scope="module")
def by_terms(folder):
    return OpenQA(open_index(folder / "lexical"), StubReader())


@pytest.fixture
def search(folder):
    return Search(open_index(folder / "index"), MixLMEncoder.from_pretrained(str(folder / "retriever"), "cpu"))


def scores_of(find, question, passages):
    return {passages.id_of_row(row): score for row, score in next(find([question], CANDIDATES)).hits}


def test_the_result_is_the_answer_with_the_scores_of_lexical_search(by_terms):
    question = "한글은 언제 만들어졌나?"
    result = json.loads(json.dumps(result_of(by_terms, question)))
    assert result["question"] == question and result["answer"] == "1443"
    first = result["candidates"][0]
    assert first["passage"] == PASSAGES[0]._asdict() and (first["text"], first["start"], first["end"]) == (
        "1443",
        4,
        8,
    )
    scores = scores_of(by_terms.index.find, question, by_terms.index.passages)
    assert {each["passage"]["id"]: each["lexical_score"] for each in result["candidates"]} == scores
    assert all({"dense_score", "hybrid_score"}.isdisjoint(each) for each in result["candidates"])


@pytest.mark.parametrize("mode", ["dense", "hybrid"])
@pytest.mark.parametrize("weight", [None, 0.3])
def test_with_vectors_each_search_has_its_scores(search, mode, weight, monkeypatch):
    monkeypatch.setattr(type(search.index), "weight", weight)
    question = "한글은 언제 만들어졌나?"
    candidates = result_of(OpenQA(search.index, StubReader(), search, mode), question)["candidates"]
    assert len(candidates) == len(PASSAGES)
    for name, find in (("dense", search.dense), ("hybrid", search.hybrid), ("lexical", search.index.find)):
        found = scores_of(find, question, search.index.passages)
        for each in candidates:
            assert each[f"{name}_score"] == pytest.approx(found.get(each["passage"]["id"]))
    assert any(each["lexical_score"] is None for each in candidates)


def test_several_indexes_have_the_scores_of_vectors_alone(folder, search):
    several = Search(ShardedIndex([search.index]), MixLMEncoder.from_pretrained(str(folder / "retriever"), "cpu"))
    candidates = result_of(OpenQA(several.index, StubReader(), several, "dense"), QUESTIONS[0])["candidates"]
    scores = scores_of(search.dense, QUESTIONS[0], search.index.passages)
    assert {each["passage"]["id"]: each["dense_score"] for each in candidates} == pytest.approx(scores)
    assert not any("lexical_score" in each or "hybrid_score" in each for each in candidates)
    assert "None" not in result_html({"answer": "", "candidates": candidates}, KOREAN)


@pytest.mark.parametrize(
    ("question", "problem"),
    [
        ("", "empty"),
        (" \n　", "empty"),
        ("가" * 1001, "has at most 1,000 characters; this one has 1,001"),
        ("가" * 1000, None),
        ("a\ud800", "half of a character"),
    ],
)
def test_what_cannot_be_answered_is_told_in_one_line(question, problem):
    assert problem_of(question, ENGLISH) is None if problem is None else problem in problem_of(question, ENGLISH)
    assert (problem_of(question, KOREAN) is None) == (problem is None)
    assert "\n" not in (problem_of(question, KOREAN) or "")


@pytest.mark.parametrize("labels", [KOREAN, ENGLISH])
def test_whatever_is_shown_is_escaped(by_terms, labels):
    page = result_html(result_of(by_terms, "한국의?"), labels)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "<script" not in page and "<img" not in page
    assert "한국의 &lt;b&gt;<mark>7</mark>&lt;/b&gt; &amp; &lt;img src=x onerror=alert(1)&gt;" in page
    result = result_of(by_terms, "한국의?")
    result["answer"] = "<i>"
    result["candidates"][0]["passage"].update(title="", id="<u>")
    page = result_html(result, labels)
    assert "<b>&lt;i&gt;</b>" in page and "&lt;u&gt;" in page and "<u>" not in page


def test_the_answer_is_marked_in_its_passage_and_that_alone_is_open(by_terms):
    page = result_html(result_of(by_terms, "한글은 언제 만들어졌나?"), KOREAN)
    (shown,) = re.findall(r'<details class="passage with-answer" open>.*?</details>', page)
    assert "한글은 <mark>1443</mark>년에 만들어졌다." in shown and page.count(" open>") == 1
    result = result_of(by_terms, "한글은 언제 만들어졌나?")
    assert (
        f"어휘 <b>{result['candidates'][0]['lexical_score']:.2f}</b>" in shown and "벡터" not in shown.split("<p")[0]
    )
    assert page.index("with-answer") < page.index("<mark>10</mark>월")


def test_no_answer_is_said_and_what_was_read_is_shown(folder):
    unsure = OpenQA(open_index(folder / "lexical"), StubReader(null_score=99.0))
    result = result_of(unsure, "한글은 언제 만들어졌나?")
    page = result_html(result, KOREAN)
    assert result["answer"] == "" and KOREAN.no_answer in page
    assert "with-answer" not in page and " open>" not in page and page.count("<details") == len(result["candidates"])
    nothing = result_of(unsure, "zzz")
    assert nothing["candidates"] == [] and KOREAN.nothing_found in result_html(nothing, KOREAN)


def ask(address, body, path="/api/answer", **headers):
    """Status and JSON of what is answered."""
    request = urllib.request.Request(address + path, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ask_question(address, question):
    return ask(address, json.dumps({"question": question}).encode())


@pytest.fixture(scope="module")
def address(by_terms):
    with running(build_app(by_terms, ["한글날은?"])) as address:
        yield address


def test_programs_get_the_result_of_the_page(address, by_terms):
    for question in QUESTIONS:
        assert ask_question(address, question) == (200, result_of(by_terms, question))


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b'"question"', b"{}", b'{"question": 3}', b'{"question": null}', b"\xff", b"[" * 50_000],
)
def test_what_is_no_question_is_refused(address, body):
    assert ask(address, body) == (400, {"error": 'send a JSON object: {"question": "..."}'})


def test_questions_that_cannot_be_answered_are_refused(address):
    assert ask_question(address, "  ") == (400, {"error": ENGLISH.empty})
    assert ask_question(address, "가" * 1001) == (400, {"error": ENGLISH.too_long.format(count=1001)})
    assert ask(address, b'{"question": "\\ud800"}') == (400, {"error": ENGLISH.not_text})
    assert ask_question(address, "가" * 1000)[0] == 200


def test_a_large_body_is_not_read(address):
    padded = json.dumps({"question": "한글날은?", "padding": ""}).encode()
    padded = padded.replace(b'""', b'"' + b"x" * (LARGEST_BODY - len(padded)) + b'"')
    assert len(padded) == LARGEST_BODY and ask(address, padded)[0] == 200
    too_large = {"Content-Length": str(LARGEST_BODY + 1)}
    assert status_before_body(address, "/api/answer", too_large) == 413
    assert status_before_body(address, "/gradio_api/queue/join", too_large) == 413
    chunked = {"Transfer-Encoding": "chunked"}
    assert status_before_body(address, "/api/answer", chunked) == 413
    for path in ("/api/answer", "/gradio_api/queue/join"):  # the chunks count then, and not the length
        assert status_before_body(address, path, {"Content-Length": "10", **chunked}) == 413
        assert status_before_body(address, path, {**chunked, "Content-Length": "10"}) == 413


def status_before_body(address, path, headers):
    """What is answered when the headers have come and nothing of the body."""
    with closing(http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)) as connection:
        connection.putrequest("POST", path)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        return connection.getresponse().status


@pytest.mark.parametrize(("path", "labels"), [("/", KOREAN), ("/en", ENGLISH)])
def test_there_is_a_page_in_each_language(address, path, labels):
    with urllib.request.urlopen(address + path) as response:
        page, policy = response.read().decode(), response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'self' ") and "http" not in policy
    shown = [html.escape(text) for text in (labels.title, labels.subtitle.format(count=4))]
    assert all(json.dumps(text)[1:-1] in page or text in page for text in shown)
    assert json.dumps(labels.placeholder)[1:-1] in page or labels.placeholder in page
    assert '"analytics_enabled":false' in page


def test_neither_page_nor_answers_ask_another_machine(by_terms, monkeypatch):
    asked, connect, look_up = [], socket.socket.connect, socket.getaddrinfo

    def recorded(function, host_of):
        def record(*arguments, **options):
            if host_of(arguments) not in ("127.0.0.1", "localhost", None):
                asked.append(arguments)
            return function(*arguments, **options)

        return record

    monkeypatch.setattr(socket.socket, "connect", recorded(connect, lambda arguments: arguments[1][0]))
    monkeypatch.setattr(socket, "getaddrinfo", recorded(look_up, lambda arguments: arguments[0]))
    with running(build_app(by_terms, [])) as address:
        assert urllib.request.urlopen(address).status == 200 and ask_question(address, "한글날은?")[0] == 200
    assert not asked


@pytest.fixture(scope="module")
def process(folder):
    """`mixlm serve` with a real retriever and reader: its process, and the address that it has printed."""
    program = "from mixlm.cli import main; main()"
    options = ["serve", "--index", f"{folder}/index", "--reader", f"{folder}/reader", "--port", "0"]
    command, environment = [sys.executable, "-c", program, *options], {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        line = process.stdout.readline()
        assert line.endswith("/  (Ctrl-C ends it)\n"), process.stderr.read()
        yield process, line.split("/  ")[0]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        # Nothing but that it was ended: neither warnings nor tracebacks.
        assert "Traceback" not in (errors := process.stderr.read()) and "Warning" not in errors, errors


def test_it_listens_to_this_machine_alone(process):
    server, address = process
    listening = [each.laddr for each in psutil.Process(server.pid).net_connections("inet") if each.status == "LISTEN"]
    assert [f"http://{each.ip}:{each.port}" for each in listening] == [address] and "://127.0.0.1:" in address


def test_many_questions_at_once_get_the_answers_of_single_ones_and_memory_stays(process, folder, search):
    server, address = process
    single = {question: ask_question(address, question) for question in QUESTIONS}
    answering = OpenQA(search.index, MixLMReader.from_pretrained(folder / "reader", "cpu"), search)
    for question, (status, result) in single.items():
        expected = answering.answer(question)
        assert status == 200 and result["answer"] == expected.text
        assert [each["passage"]["id"] for each in result["candidates"]] == [
            each.passage.id for each in expected.candidates
        ]
    assert len({result["answer"] for _, result in single.values()}) > 1
    memory = []
    with ThreadPoolExecutor(50) as threads:
        for _ in range(6):
            asked = QUESTIONS * 10
            assert list(threads.map(lambda question: ask_question(address, question), asked)) == [
                single[question] for question in asked
            ]
            memory.append(psutil.Process(server.pid).memory_info().rss / 2**20)
    assert memory[5] - memory[1] < 4, f"MiB after each round: {memory}"


def test_of_too_many_questions_one_more_is_told_so(search, monkeypatch):
    go_on = threading.Event()

    def slow(answering, question):
        go_on.wait(60)
        return {"answer": question, "candidates": []}

    monkeypatch.setattr(serving, "result_of", slow)
    monkeypatch.setattr(serving, "MOST_WAITING", 2)
    app = build_app(OpenQA(search.index, StubReader({}), search), [])
    with running(app) as address, ThreadPoolExecutor(20) as threads:
        asked = [threads.submit(ask_question, address, str(number)) for number in range(20)]
        refused = list(islice(as_completed(asked), 17))  # the others wait
        go_on.set()
        assert all(each.result() == (503, {"error": ENGLISH.busy}) for each in refused)
        assert sorted(each.result()[0] for each in asked) == [200] * 3 + [503] * 17
        assert ask_question(address, "one more")[0] == 200


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["serve", *arguments])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_errors_are_one_line(folder, capsys, monkeypatch):
    index, reader = ("--index", str(folder / "lexical")), ("--reader", str(folder / "reader"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "cannot listen there" in error_of(capsys, *index, *reader, "--port", port)
    assert "must be 0 to 65535" in error_of(capsys, *index, *reader, "--port", "65536")
    assert "--host nowhere.invalid" in error_of(capsys, *index, *reader, "--host", "nowhere.invalid")
    for host in ("a..b", "x" * 70):
        assert "is no name of a machine" in error_of(capsys, *index, *reader, "--host", host)
    assert "not a whole index" in error_of(capsys, "--index", str(folder), *reader, "--port", "0")
    assert str(folder / "none") in error_of(capsys, *index, "--reader", str(folder / "none"), "--port", "0")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'mixlm[demo]'" in error_of(capsys, *index, *reader, "--port", "0")
