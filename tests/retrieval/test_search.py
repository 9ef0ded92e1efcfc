"""Search by vectors and by both, in Python and on the command line."""

import json
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from mixlm.cli import main
from mixlm.data.passages import Passage
from mixlm.encoder import Encoding, MixLMEncoder
from mixlm.errors import UserError
from mixlm.evaluation.retrieval import mean_percent, ranking_scores
from mixlm.evaluation.retrieval_files import read_run
from mixlm.retrieval import index as index_module
from mixlm.retrieval import index_dense
from mixlm.retrieval.analysers import BigramAnalyser
from mixlm.retrieval.fusion import interpolation, reciprocal_rank_fusion
from mixlm.retrieval.hits import Found
from mixlm.retrieval.index import build_index, open_index
from mixlm.retrieval.search import WEIGHTS, Search
from mixlm.retrieval.vectors import StoredVectors, encode_passages

QUESTIONS = ["가장 큰 섬은?", "한글을 만든 해는?", "dog", "없음"]


def build(passages, retriever, folder, kind="exact"):
    encode_passages(passages, retriever, folder / "vectors")
    vectors = StoredVectors(folder / "vectors")
    return build_index(vectors.passages(), folder / "index", BigramAnalyser(), vectors, kind)


@pytest.fixture(scope="module")
def built(tmp_path_factory, passages, retriever):
    folder = tmp_path_factory.mktemp("built")
    build(passages, retriever, folder)
    return folder


@pytest.fixture
def folder(built, tmp_path, monkeypatch):
    """A folder with vectors, an index, passages, questions and judgements, where the verbs run."""
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    passages = StoredVectors(tmp_path / "vectors").passages()
    (tmp_path / "passages.jsonl").write_text("\n".join(json.dumps(passage._asdict()) for passage in passages))
    questions = [{"id": str(number), "text": text} for number, text in enumerate(QUESTIONS)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "qrels").write_text("0 0 jeju 1\n1 0 sejong 1\n2 0 dogs 1\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def search(folder, retriever):
    return Search(open_index(folder / "index"), MixLMEncoder.from_pretrained(retriever, "cpu"))


def error_of(capsys, arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


def rows(hits):
    return [[row for row, _ in found.hits] for found in hits]


def test_the_manifest_says_what_is_there(folder, retriever):
    manifest = open_index(folder / "index").manifest
    encoder = MixLMEncoder.from_pretrained(retriever, "cpu").fingerprint()
    made_by = {"encoder": encoder, "model": str(Path(retriever).resolve())}
    assert manifest["dense"] == {"kind": "exact", "dimension": 16, "dtype": "float32", **made_by}
    assert "dense/vectors.faiss" in manifest["files"] and "faiss" in manifest["libraries"]


def test_dense_hits_are_the_greatest_inner_products(search, passages, retriever):
    encoder = MixLMEncoder.from_pretrained(retriever, "cpu")
    scores = encoder.encode_queries(QUESTIONS) @ encoder.encode_passages(passages).T
    hits = list(search.dense(QUESTIONS, 100))
    for of_question, found in zip(scores, hits, strict=True):
        # Two passages have the same text: on some machines their vectors differ in the last bit.
        assert list(found.hits) == sorted(found.hits, key=lambda hit: (-hit.score, hit.row))
        rows = [hit.row for hit in found.hits]
        assert sorted(rows) == list(range(7))
        assert [hit.score for hit in found.hits] == pytest.approx(of_question[rows].tolist(), rel=1e-4, abs=1e-4)


def test_hybrid_hits_are_both_rankings_fused(search):
    dense = [found.hits for found in search.dense(QUESTIONS, 200)]
    lexical = list(search.index.lexical.search(QUESTIONS, 200))
    by_id = search.index.passages.id_of_row
    fused = [reciprocal_rank_fusion(both, 5, by_id) for both in zip(dense, lexical, strict=True)]
    assert [found.hits for found in search.hybrid(QUESTIONS, 5)] == fused
    search.index.store_tuning("hybrid", {"weight": 0.3})
    fused = [interpolation(*both, 0.3, 5, by_id) for both in zip(dense, lexical, strict=True)]
    assert [found.hits for found in search.hybrid(QUESTIONS, 5)] == fused
    assert open_index(search.index.folder).weight == 0.3


def test_tuning_judges_what_an_evaluation_judges(search):
    """Also where scores are equal: every rank of the one ranking and of the other, by reciprocal ranks."""
    ids = [search.index.passages.id_of_row(row) for row in range(len(search.index.passages))]
    for wanted in ids:
        qrels = {str(number): {wanted: 1} for number in range(len(QUESTIONS))}
        tuned = search.tune({str(number): text for number, text in enumerate(QUESTIONS)}, qrels)
        for weight, score in tuned.items():
            search.index.store_tuning("hybrid", {"weight": weight})
            hits = {
                str(number): [(ids[row], value) for row, value in found.hits]
                for number, found in enumerate(search.hybrid(QUESTIONS, 10))
            }
            assert score == pytest.approx(mean_percent(ranking_scores(hits, qrels)["mrr@10"])), (wanted, weight)


@pytest.mark.parametrize("mode", ["dense", "hybrid"])
def test_a_blank_question_has_no_hits_and_changes_no_other(search, mode, monkeypatch):
    find = getattr(search, mode)
    assert list(find(["", "  ", *QUESTIONS, "\n"], 3)) == [Found([])] * 2 + [*find(QUESTIONS, 3), Found([])]
    assert list(find([""], 3)) == [Found([])] and list(find([], 3)) == []
    expected = list(find(QUESTIONS, 3))
    monkeypatch.setattr("mixlm.retrieval.search._QUESTIONS_AT_ONCE", 3)
    assert rows(find(QUESTIONS, 3)) == rows(expected)


def test_another_encoder_is_refused(folder, retriever, other_retriever, capsys):
    here, other = (
        MixLMEncoder.from_pretrained(name).fingerprint()["weights"] for name in (retriever, other_retriever)
    )
    error = error_of(capsys, f"search --index index --model {other_retriever} --query x")
    assert f"weights is {here} there and {other} now; give the model that encoded its passages" in error


def test_decomposed_questions_find_what_composed_ones_find(search):
    decomposed = [unicodedata.normalize("NFD", question) for question in QUESTIONS]
    for find in (search.dense, search.hybrid, search.index.find):
        assert list(find(decomposed, 10)) == list(find(QUESTIONS, 10))


def test_vectors_of_texts_that_were_not_composed_are_refused(tmp_path, passages, retriever, monkeypatch):
    whole = MixLMEncoder.fingerprint
    with monkeypatch.context() as patch:  # as it was when texts were encoded as they came
        patch.setattr(
            MixLMEncoder,
            "fingerprint",
            lambda self: {name: value for name, value in whole(self).items() if name != "normal_form"},
        )
        build(passages, retriever, tmp_path)
    with pytest.raises(UserError, match="has other vectors: normal_form is None there and NFC now"):
        encode_passages(passages, retriever, tmp_path / "vectors")
    with pytest.raises(UserError, match="was built with another encoder: normal_form is None there and NFC now"):
        Search(open_index(tmp_path / "index"), MixLMEncoder.from_pretrained(retriever, "cpu"))


def test_vectors_that_the_encoder_does_not_give_are_found_out(folder, search, passages, retriever, monkeypatch):
    assert search.verify() == 7
    encode = MixLMEncoder.encode_passages
    with monkeypatch.context() as patch:
        patch.setattr(MixLMEncoder, "encode_passages", lambda self, texts: 1.05 * encode(self, texts))
        shutil.rmtree(folder / "vectors")
        build(passages, retriever, folder)
    with pytest.raises(
        UserError, match="7 of 7 passages, such as 'jeju', have vectors that the encoder does not give"
    ):
        Search(open_index(folder / "index"), MixLMEncoder.from_pretrained(retriever, "cpu")).verify()


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_a_new_index_has_what_was_added_and_not_what_was_removed(folder, passages, retriever, kind):
    changed = [*passages[1:], Passage("new", "", "가장 큰 섬은?")]
    manifest = build(changed, retriever, folder, kind)
    assert manifest["dense"]["kind"] == kind and manifest["dense"].get("recall@10", 1.0) == 1.0
    search = Search(open_index(folder / "index"), MixLMEncoder.from_pretrained(retriever, "cpu"))
    for find in (search.dense, search.hybrid):
        ids = {search.index.passages.id_of_row(row) for row, _ in next(find(["가장 큰 섬은?"], 10)).hits}
        assert ids == {passage.id for passage in changed}


def test_an_index_is_changed_without_a_new_graph(folder, passages, retriever, capsys, monkeypatch):
    # Of passages with the same text the vectors may differ in the last bit, and then they are others.
    passages = [passage._replace(text=f"{passage.text} {number}") for number, passage in enumerate(passages)]
    build(passages, retriever, folder, "hnsw")
    changed = [Passage("new", "", "가장 큰 섬은?"), *passages[1:5], passages[6], passages[5]._replace(text="cats run")]
    new_graph = index_dense._new_hnsw
    monkeypatch.setattr(index_dense, "_new_hnsw", None)
    encode_passages(changed, retriever, folder / "vectors")
    main("index --vectors vectors --hnsw --out index".split())
    told = "2 vectors are added to the 5 that stay; 2, whose passages are gone, are passed over"
    assert told in capsys.readouterr().out
    search = Search(open_index(folder / "index"), MixLMEncoder.from_pretrained(retriever, "cpu"))
    assert search.verify() == len(changed)
    monkeypatch.setattr(index_dense, "_new_hnsw", new_graph)
    vectors = StoredVectors(folder / "vectors")
    build_index(vectors.passages(), folder / "anew", BigramAnalyser(), vectors, "exact")
    anew = Search(open_index(folder / "anew"), MixLMEncoder.from_pretrained(retriever, "cpu"))
    for find in ("dense", "hybrid"):
        assert list(getattr(search, find)(QUESTIONS, 10)) == list(getattr(anew, find)(QUESTIONS, 10))
    # Where three of nine would be dead weight, where no more than half would stay, and where most is gone, it is built
    # from nothing.
    new = [Passage(f"new {number}", "", f"{number} cats") for number in range(6)]
    for others in (changed[1:], [*changed[1:], *new], passages[5:]):
        assert "change" not in build(others, retriever, folder, "hnsw")["dense"]


def test_the_graph_of_another_encoder_is_not_kept(folder, passages, retriever, other_retriever):
    build(passages, retriever, folder, "hnsw")
    encode_passages(passages, other_retriever, folder / "other")
    vectors = StoredVectors(folder / "other")
    manifest = build_index(vectors.passages(), folder / "index", BigramAnalyser(), vectors, "hnsw")
    assert "change" not in manifest["dense"]
    search = Search(open_index(folder / "index"), MixLMEncoder.from_pretrained(other_retriever, "cpu"))
    assert search.verify() == len(passages)


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_killed_build_leaves_the_old_index(folder):
    program = (
        "import os; from pathlib import Path; from mixlm.retrieval import index_dense, index, vectors\n"
        "from mixlm.retrieval.analysers import BigramAnalyser\n"
        "index_dense.DenseIndex.save = lambda *_: os._exit(9)\n"
        "stored = vectors.StoredVectors(Path('vectors'))\n"
        "index.build_index(stored.passages(), Path('index'), BigramAnalyser(), stored)"
    )
    before = contents(folder / "index")
    assert subprocess.run([sys.executable, "-c", program], cwd=folder).returncode == 9
    assert contents(folder / "index") == before and (folder / ".index.partial").exists()
    main("index --vectors vectors --out index".split())
    assert contents(folder / "index") == before and not (folder / ".index.partial").exists()


def test_a_build_that_fails_leaves_the_old_index(folder, capsys, monkeypatch):
    before = contents(folder)
    assert "7 passages are too few" in error_of(capsys, "index --vectors vectors --ivfpq --out index")
    assert contents(folder) == before

    def fails(module):
        raise UserError(f"{module} is not installed")

    monkeypatch.setattr(index_module, "required", fails)
    assert "is not installed" in error_of(capsys, "index --vectors vectors --out index")
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["vectors.faiss", "finder.faiss"])
def test_a_damaged_file_is_named(folder, name):
    main("index --vectors vectors --hnsw --out index".split())
    file = folder / "index" / "dense" / name
    content = file.read_bytes()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=f"dense/{name} changed since the index was built"):
            open_index(folder / "index")
    file.unlink()
    with pytest.raises(UserError, match="not a whole index"):
        open_index(folder / "index")


def test_lexical_search_needs_neither_faiss_nor_an_encoder(folder):
    main("index --passages passages.jsonl --lexical_only --out lexical".split())
    program = (
        "import sys; from mixlm.cli import main; main(['search', '--index', 'lexical', '--query', '섬은'])\n"
        "sys.exit('faiss' in sys.modules or 'mixlm.encoder' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=folder).returncode == 0


def test_tuning_scores_the_hits_of_each_weight(search):
    queries = dict(zip("abcd", QUESTIONS, strict=True))
    qrels = {"a": {"jeju": 1}, "b": {"sejong": 1}, "c": {"dogs": 1, "sea": 0}, "e": {"sea": 1}}  # "d" is not judged
    scores = search.tune(queries, qrels)
    assert set(scores) == {None, *WEIGHTS}
    # Each has the most terms of its question, but of the first Seoul has as many, and the greater id.
    assert scores[0.0] == pytest.approx(100 * (1 / 2 + 1 + 1) / 3)
    for weight in scores:
        search.index.store_tuning("hybrid", {"weight": weight})
        ranks = []
        for query, fused in zip("abc", search.hybrid(QUESTIONS[:3], 10), strict=True):
            found = [search.index.passages.id_of_row(row) for row, _ in fused.hits]
            ranks.append(1 + found.index(next(iter(qrels[query]))))
        assert scores[weight] == pytest.approx(100 * sum(1 / rank for rank in ranks) / 3)
    with pytest.raises(UserError, match="no query is judged"):
        search.tune(queries, {"other": {"jeju": 1}})
    # Of another set of passages, or of the same in a file of another name.
    with pytest.raises(UserError, match=r"no passage that is relevant .* in the index, and 'file-0-0' in the"):
        search.tune(queries, {"a": {"file-0-0": 1, "jeju": 0}})
    with pytest.raises(UserError, match="no query has a relevant passage"):
        search.tune(queries, {"a": {"jeju": 0}})


class TestVerbs:
    def test_from_passages_to_hits(self, folder, retriever, capsys):
        main(f"encode --model {retriever} --passages passages.jsonl --out new-vectors --batch_size 2".split())
        main("index --vectors new-vectors --hnsw --out new".split())
        out = capsys.readouterr().out
        assert "new-vectors: the vectors of 7 passages" in out and "7 passages: new\n" in out
        assert "100.0% of the 10 nearest are found" in out
        for mode in ("dense", "hybrid", "lexical"):
            asked = f"search --index new --queries questions.jsonl --top_k 50 --mode {mode} --out {mode}.trec".split()
            main(asked if mode == "lexical" else [*asked, "--model", retriever])
            assert f"{mode} hits of 4 questions" in capsys.readouterr().out
        dense, hybrid, lexical = (read_run(folder / f"{mode}.trec") for mode in ("dense", "hybrid", "lexical"))
        assert all(len(dense[number]) == len(hybrid[number]) == 7 for number in "0123") and "3" not in lexical
        main(f"search --index new --model {retriever} --queries questions.jsonl --top_k 50 --out default.trec".split())
        assert read_run(folder / "default.trec") == hybrid

    def test_hits_are_printed(self, folder, retriever, capsys):
        main(["search", "--index", "index", "--model", retriever, "--verify", "--query", "가장 큰 섬은?"])
        said = capsys.readouterr()
        assert "7 passages were encoded again: their vectors are those of the index" in said.err
        assert said.out.startswith("1  0.0") and len(said.out.splitlines()) == 2 * 7
        main(["search", "--index", "index", "--model", retriever, "--query", "?!"])  # which has no word
        assert len(capsys.readouterr().out.splitlines()) == 2 * 7

    def test_the_index_knows_where_its_encoder_is(self, folder, retriever, capsys):
        moved = folder / "moved"
        shutil.copytree(retriever, moved)
        main("encode --model moved --passages passages.jsonl --out new-vectors".split())
        main("index --vectors new-vectors --out index".split())
        search = "search --index index --queries questions.jsonl --top_k 20 --mode hybrid --out"
        main(f"{search} here.trec".split())
        moved.rename(folder / "elsewhere")
        assert f"{moved}: the encoder of index is no longer there; give its folder as --model" in error_of(
            capsys, f"{search} gone.trec"
        )
        main(f"{search} elsewhere.trec --model elsewhere".split())
        assert (folder / "elsewhere.trec").read_text() == (folder / "here.trec").read_text()

    def test_a_passage_without_text_says_that_there_is_no_answer(self, folder, retriever, capsys):
        shutil.copytree(retriever, folder / "null")
        Encoding(max_query_length=16, max_passage_length=32, null_passage=True).save(folder / "null")
        main("encode --model null --passages passages.jsonl --out null-vectors".split())
        main("index --vectors null-vectors --out null-index".split())
        capsys.readouterr()
        encoder = MixLMEncoder.from_pretrained(folder / "null", "cpu")
        expected = encoder.encode_queries(QUESTIONS) @ encoder.encode_empty_passage()
        best = (
            encoder.encode_queries(QUESTIONS)
            @ encoder.encode_passages(list(StoredVectors(folder / "vectors").passages())).T
        ).max(axis=1)
        for mode in ("dense", "hybrid"):
            main(f"search --index null-index --mode {mode} --queries questions.jsonl --out {mode}.jsonl".split())
            found = [json.loads(line) for line in (folder / f"{mode}.jsonl").read_text().splitlines()]
            assert [each["empty_passage_score"] for each in found] == pytest.approx(expected, rel=1e-4, abs=1e-5)
            assert [each["has_answer"] for each in found] == (best > expected).tolist()
            assert all(len(each["hits"]) == 7 for each in found)
            assert f"no passage answers {(best <= expected).sum()} of them" in capsys.readouterr().out
        for question, has_answer in zip(QUESTIONS, best > expected, strict=True):
            main(["search", "--index", "null-index", "--query", question])
            assert capsys.readouterr().out.startswith("no passage answers this question") == (not has_answer)

    def test_where_nothing_is_found_there_is_no_answer(self, search, retriever, monkeypatch):
        encoder = MixLMEncoder.from_pretrained(retriever, "cpu")
        monkeypatch.setattr(search, "_empty_passage", encoder.encode_queries(["섬"])[0])
        monkeypatch.setattr(index_dense.DenseIndex, "search", lambda self, vectors, top_k: ([] for _ in vectors))
        assert [(found.hits, found.has_answer) for found in search.dense(QUESTIONS, 3)] == [([], False)] * 4

    def test_a_new_index_says_that_its_weight_is_gone(self, folder, retriever, capsys):
        main("tune --index index --queries questions.jsonl --qrels qrels".split())
        for gone in (True, False):
            capsys.readouterr()
            main("index --vectors vectors --out index".split())
            assert ("mixlm tune makes them anew" in capsys.readouterr().out) == gone

    @pytest.mark.parametrize("question", ["섬" * 100_000, "가장 큰 섬은? " * 12_500, "\U0001f600" * 1000])
    def test_a_question_of_any_length(self, search, question):
        for find in (search.dense, search.hybrid):
            assert len(next(find([question], 3)).hits) == 3

    def test_tune(self, folder, retriever, capsys):
        before = contents(folder / "index")
        main(f"tune --index index --model {retriever} --queries questions.jsonl --qrels qrels".split())
        out = capsys.readouterr().out
        assert out.count("chosen") == 1 and "reciprocal rank fusion" in out
        index = open_index(folder / "index")
        assert index.manifest["hybrid"].keys() == {"weight", "mrr@10"}
        after = contents(folder / "index")
        assert {name for name in after if before.get(name) != after[name]} == {"manifest.json"}
        assert before.keys() == after.keys()

    def test_bad_input_is_one_line_and_leaves_nothing(self, folder, retriever, capsys):
        main("index --passages passages.jsonl --lexical_only --out lexical".split())
        before = contents(folder)
        search = "search --queries questions.jsonl --out new.trec --index"
        for arguments, part in [
            ("index --vectors vectors --lexical_only --out new", "--lexical_only is for --passages"),
            ("index --passages passages.jsonl --lexical_only --hnsw --out new", "--hnsw is for --vectors"),
            ("index --vectors vectors --hnsw --ivfpq --out new", "not allowed with"),
            ("index --vectors vectors --passages passages.jsonl --out new", "not allowed with"),
            ("index --out new", "one of the arguments --vectors --passages is required"),
            ("index --vectors absent --out new", "absent: has no vectors"),
            ("index --vectors index --out new", "index: has no vectors"),
            (f"{search} lexical --mode dense --model {retriever}", "lexical: has no vectors to search by"),
            (f"{search} index --mode lexical --verify", "--verify: is for search by vectors"),
            (f"{search} index --model absent", "absent: cannot be loaded"),
            (f"tune --index lexical --model {retriever} --queries questions.jsonl --qrels qrels", "has no vectors"),
            (f"tune --index index --model {retriever} --queries questions.jsonl --qrels absent", "absent"),
        ]:
            assert part in error_of(capsys, arguments)
        assert contents(folder) == before
