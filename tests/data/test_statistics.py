import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from mixlm.data import statistics
from mixlm.data.corpus import Document
from mixlm.data.statistics import corpus_statistics
from mixlm.errors import UserError


def documents(*texts):
    """Documents of sentences that are separated by slashes."""
    return [Document(text.split("/"), "c.dat", number) for number, text in enumerate(texts, start=1)]


@pytest.fixture
def evaluation(tmp_path):
    """Writes a SQuAD-style file of (context, questions)."""

    def write(*paragraphs):
        data = [
            {
                "context": context,
                "qas": [
                    {"id": f"{number}-{place}", "question": question, "answers": []}
                    for place, question in enumerate(questions)
                ],
            }
            for number, (context, questions) in enumerate(paragraphs)
        ]
        file = tmp_path / "dev.json"
        file.write_text(json.dumps({"data": [{"title": "a", "paragraphs": data}]}), "utf-8")
        return file

    return write


def test_sizes():
    found = corpus_statistics(documents("One, two./셋 넷!", "Three"))
    assert (found.documents, found.sentences, found.words, found.characters) == (2, 3, 5, 16)
    assert found.tokens is found.unknown_tokens is None
    assert set(found.lengths) == {"sentences of a document", "characters of a sentence"}


def test_lengths_are_quantiles():
    sizes = np.random.default_rng(0).integers(1, 50, 300)
    found = corpus_statistics(documents(*("/".join(["x"] * size) for size in sizes)))
    summary = found.lengths["sentences of a document"]
    expected = np.quantile(sizes, [0.5, 0.9, 0.99], method="inverted_cdf")
    assert [summary.median, summary.p90, summary.p99] == expected.tolist()
    assert summary.mean == pytest.approx(sizes.mean()) and summary.longest == sizes.max()


def test_tokens_are_those_of_the_tokenizer():
    from test_store import make_tokenizer

    tokenizer = make_tokenizer()
    corpus = documents("aa b/c", "[MASK] zz a")
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    ids = [[backend.encode(sentence, add_special_tokens=False).ids for sentence in each.sentences] for each in corpus]
    backend.encode_special_tokens = False
    backend.enable_truncation(1)
    backend.enable_padding(length=8)
    as_it_was = backend.to_str()
    found = corpus_statistics(corpus, backend, tokenizer.unk_token_id)
    assert found.tokens == sum(len(sentence) for each in ids for sentence in each)
    assert found.unknown_tokens == sum(sentence.count(tokenizer.unk_token_id) for each in ids for sentence in each) > 0
    assert found.lengths["tokens of a document"].longest == max(sum(map(len, each)) for each in ids)
    assert found.lengths["tokens of a sentence"].longest == max(len(sentence) for each in ids for sentence in each)
    assert backend.to_str() == as_it_was and not backend.encode_special_tokens


def test_duplicates():
    found = corpus_statistics(
        documents("a b/c", "a b/c", "A, b. /c!", "제3조/12", "제47조/9", "a b/d", "a/b/c")
    ).duplicates
    assert found.documents == 1
    assert found.similar_documents == 4  # "a b c" three times more, and the article of another number
    assert found.sentences == 4  # "a b" and "c", each twice more
    assert corpus_statistics(documents("a", "b")).duplicates == statistics.Duplicates(0, 0, 0)


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_duplicates_are_counted_over_the_borders_of_blocks(at_once, monkeypatch):
    monkeypatch.setattr(statistics, "HASHES_AT_ONCE", at_once)
    sentences = np.random.default_rng(0).integers(0, 20, 50).tolist()
    found = corpus_statistics(documents("/".join(map(str, sentences)))).duplicates
    assert found.sentences == 50 - len(set(sentences))


WORDS = [f"낱말{number}" for number in range(40)]


def test_a_text_is_known_by_its_runs_of_words(evaluation):
    text = " ".join(WORDS)  # 33 runs of 8 words
    file = evaluation(
        (text, ["무엇?", "Who is it?"]), ("short one", ["Why?"]), (" ".join(f"x{n}" for n in range(9)), [])
    )

    def overlap_with(*texts):
        (found,) = corpus_statistics(documents("something else", *texts), evaluation_files=[file]).overlaps
        assert (found.texts, found.short_texts, found.questions) == (2, 1, 3)
        return found

    assert overlap_with(" ".join(WORDS[:7])).touched_texts == 0
    touched = overlap_with("before " + " ".join(WORDS[3:11]) + " behind")
    assert (touched.touched_texts, touched.known_texts) == (1, 0)
    assert touched.most_known == [statistics.KnownText("0-0", pytest.approx(1 / 33), "c.dat:2")]
    # In two documents, over the border of sentences, with other punctuation and case: 24 of 33 runs.
    parts = (", ".join(WORDS[:10]) + "/" + " — ".join(WORDS[10:20]), " ".join(WORDS[20:38]))
    known = overlap_with(*parts)
    assert (known.touched_texts, known.known_texts, known.questions_about_known_texts) == (1, 1, 2)
    assert known.most_known[0].share == pytest.approx(24 / 33) and known.most_known[0].place == "c.dat:2"
    # A document of other words, of which many lie just below those of the text, is not the one that has most of it.
    others = " ".join([*(f"{word} {word}x" for word in WORDS * 200), *WORDS[:8]])
    for documents_, place in (((text, others), "c.dat:2"), ((others, text), "c.dat:3")):
        assert overlap_with(*documents_).most_known[0] == statistics.KnownText("0-0", 1.0, place)
    assert overlap_with(" ".join(reversed(WORDS))).touched_texts == 0
    assert overlap_with("Who is it", "who is/it").known_questions == 1


def test_decomposed_text_is_known_too(evaluation):
    import unicodedata

    text = "한강은 서울을 지나 서해로 흐르는 큰 강으로 다리가 많다"
    file = evaluation((unicodedata.normalize("NFD", text), ["어디?"]))
    (found,) = corpus_statistics(documents(text), evaluation_files=[file]).overlaps
    assert found.known_texts == 1


def test_several_evaluations_are_looked_for_apart(evaluation, tmp_path):
    evaluation((" ".join(WORDS), ["a?"])).rename(tmp_path / "one.json")
    other = evaluation(("nothing of this is there at all, not a word", ["a?"]))
    found = corpus_statistics(documents(" ".join(WORDS)), evaluation_files=[tmp_path / "one.json", other]).overlaps
    assert [each.known_texts for each in found] == [1, 0]


def test_nothing_to_measure():
    with pytest.raises(UserError, match="no document has text"):
        corpus_statistics([])


def test_memory_does_not_grow_with_the_corpus(evaluation):
    file = evaluation((" ".join(WORDS), ["a?"]))

    def peak(number_of_documents):
        texts = (
            Document([f"문장 {number} {place}" for place in range(5)], "", 1) for number in range(number_of_documents)
        )
        tracemalloc.start()
        corpus_statistics(texts, evaluation_files=[file])
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    peak(100)  # what is made at a first call
    few, many = peak(500), peak(2500)
    assert many - few < 2000 * (5 + 2) * 8 * 2  # hashes, and the room of arrays that grow


def test_duplicates_are_counted_where_the_hashes_are():
    """In a process of its own, whose peak has also what libraries take without telling Python.

    (getrusage's has also that of the process which has started it.)
    """
    program = """
import numpy as np
from mixlm.data.statistics import _Hashes

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

_Hashes().repeated()  # what is made at a first call
hashes = _Hashes()
hashes.values.frombytes(np.random.default_rng(0).permutation(np.arange(2_000_000) // 2).tobytes())
before = peak()
assert hashes.repeated() == 1_000_000
print((peak() - before) / 2_000_000)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 1  # bytes a hash, which has 8 itself
