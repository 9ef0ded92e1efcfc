"""Search by vectors."""

from types import SimpleNamespace

import numpy as np
import pytest

from mixlm.errors import UserError
from mixlm.retrieval import index_dense
from mixlm.retrieval.index_dense import DenseIndex


def clustered(count, dimension=32, clusters=100, seed=0):
    """Vectors of length 1 around some centres."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((clusters, dimension))
    vectors = centres[random.integers(clusters, size=count)] + 0.5 * random.standard_normal((count, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def build(vectors, kind="exact"):
    return DenseIndex.build(np.array_split(vectors, 3), kind)


def found(index, questions, top_k):
    return [[tuple(hit) for hit in hits] for hits in index.search(questions, top_k)]


def brute_force(vectors, questions, top_k):
    scores = (questions.astype(np.float64)[:, None] * vectors.astype(np.float64)).sum(axis=2).astype(np.float32)
    orders = [sorted(range(len(vectors)), key=lambda row: (-of_question[row], row)) for of_question in scores]
    return [
        [(row, float(of_question[row])) for row in order[:top_k]]
        for of_question, order in zip(scores, orders, strict=True)
    ]


@pytest.mark.parametrize("top_k", [1, 7, 300, 10**6])
def test_exact_search_is_brute_force(top_k):
    vectors, questions = 3 * clustered(300), clustered(40, seed=1)
    assert found(build(vectors), questions, top_k) == brute_force(vectors, questions, top_k)


@pytest.mark.parametrize("top_k", [1, 3, 40, 99])
def test_equal_scores_come_in_the_order_of_the_passages_and_the_first_are_kept(top_k):
    """Many passages have one vector: more than are asked for, and than FAISS is asked for first."""
    vectors = np.concatenate([clustered(10), *[clustered(5, seed=2)] * 30, -clustered(10)])
    questions = clustered(30, seed=2)
    assert found(build(vectors), questions, top_k) == brute_force(vectors, questions, top_k)


def test_equal_scores_of_one_question_search_no_other_again(monkeypatch):
    many = np.repeat(clustered(1, seed=2), 400, axis=0)
    vectors, questions = np.concatenate([clustered(500), many]), np.concatenate([clustered(20, seed=1), many[:1]])
    searched = []

    def counted(real):
        def search(self, questions, *arguments, **options):
            searched.append(len(questions))
            return real(self, questions, *arguments, **options)

        return search

    flat = index_dense.faiss.IndexFlatIP
    for name in ("search", "range_search"):
        monkeypatch.setattr(flat, name, counted(getattr(flat, name)))
    monkeypatch.setattr(index_dense, "_SCORES_AT_ONCE", 1000)  # and scores are added up in parts
    assert found(build(vectors), questions, 20) == brute_force(vectors, questions, 20)
    assert sum(searched) == len(questions) + 1


def test_the_company_of_a_question_changes_nothing(monkeypatch):
    index, questions = build(clustered(2000)), clustered(50, seed=1)
    together = found(index, questions, 20)
    assert [found(index, question[None], 20)[0] for question in questions] == together
    monkeypatch.setattr(index_dense, "_SCORES_AT_ONCE", 100)
    assert found(index, questions, 20) == together
    assert [hits[:5] for hits in together] == found(index, questions, 5)


def test_vectors_of_equal_and_zero_scores():
    vectors = np.zeros((50, 4), np.float32)
    assert found(build(vectors), np.ones((2, 4), np.float32), 3) == [[(0, 0.0), (1, 0.0), (2, 0.0)]] * 2


def test_no_questions():
    assert found(build(clustered(20)), np.empty((0, 32), np.float32), 5) == []


@pytest.fixture(scope="module")
def approximate():
    """Each kind over the same 10,000 vectors."""
    vectors = clustered(10_000)
    return vectors, {kind: build(vectors, kind) for kind in ("hnsw", "ivfpq")}


@pytest.mark.parametrize(("kind", "bound"), [("hnsw", 0.98), ("ivfpq", 0.8)])
def test_approximate_search_finds_most(approximate, kind, bound):
    vectors, indexes = approximate
    index, questions = indexes[kind], clustered(200)
    exact, hits = found(build(vectors), questions, 10), found(index, questions, 10)
    for question, each in zip(questions, hits, strict=True):
        rows, scores = zip(*each, strict=True)
        np.testing.assert_allclose(scores, vectors[[*rows]] @ question, rtol=1e-5)
    share = np.mean([len(set(each) & set(best)) / 10 for each, best in zip(hits, exact, strict=True)])
    assert share >= bound
    assert index.recall() >= bound
    assert all(each == sorted(each, key=lambda hit: (-hit[1], hit[0])) for each in hits)


def test_an_exact_index_finds_all():
    assert build(clustered(500)).recall() == 1.0


@pytest.mark.parametrize("kind", ["exact", "hnsw", "ivfpq"])
def test_saved_and_loaded_it_finds_the_same(approximate, kind, tmp_path):
    vectors, indexes = approximate
    index = indexes.get(kind) or build(vectors)
    index.save(tmp_path / "dense")
    loaded = DenseIndex.load(tmp_path / "dense")
    questions = clustered(20, seed=3)
    assert found(loaded, questions, 10) == found(index, questions, 10)
    assert loaded.parameters == index.parameters and len(loaded) == 10_000
    np.testing.assert_array_equal(loaded.vectors, vectors)
    # The vectors are on the disk once.
    size = sum(file.stat().st_size for file in (tmp_path / "dense").iterdir())
    assert size < 2 * vectors.nbytes + (10_000 * 65 * 4 if kind == "hnsw" else 0)
    assert len(found(loaded, questions[:1], 20_000)[0]) <= 10_000


def test_the_parameters_follow_the_size(approximate):
    _, indexes = approximate
    assert indexes["hnsw"].parameters == {"kind": "hnsw", "M": 32, "efConstruction": 200, "efSearch": 64}
    assert indexes["ivfpq"].parameters == {"kind": "ivfpq", "nlist": 256, "nprobe": 16, "M": 8, "nbits": 8}
    assert build(clustered(5)).parameters == {"kind": "exact"}


@pytest.mark.parametrize(
    ("count", "effort"), [(1, 64), (100_000, 64), (100_001, 128), (1_000_000, 128), (1_000_001, 256)]
)
def test_a_graph_is_searched_longer_where_there_is_more(count, effort):
    graph = SimpleNamespace(ntotal=count, hnsw=SimpleNamespace(efSearch=None))
    index_dense._set_effort(graph)
    assert graph.hnsw.efSearch == effort


def test_a_graph_that_has_grown_is_searched_as_its_size_now_asks(tmp_path, monkeypatch):
    build(clustered(20), "hnsw").save(tmp_path / "before")
    monkeypatch.setattr(index_dense, "_set_effort", lambda index: setattr(index.hnsw, "efSearch", index.ntotal))
    grown = DenseIndex.extend(tmp_path / "before", clustered(10, seed=1), np.arange(30))
    grown.save(tmp_path / "after")
    assert DenseIndex.load(tmp_path / "after").parameters["efSearch"] == 30


def test_every_build_finds_the_same(approximate):
    vectors, indexes = approximate
    questions = clustered(20, seed=3)
    assert found(build(vectors, "ivfpq"), questions, 10) == found(indexes["ivfpq"], questions, 10)


def test_too_few_passages_for_codes_are_refused():
    with pytest.raises(UserError, match="300 passages are too few .* 10,000; use an exact index"):
        build(clustered(300), "ivfpq")


def test_float16_is_read():
    vectors = clustered(100).astype(np.float16)
    assert found(build(vectors), clustered(5, seed=1), 3) == brute_force(vectors, clustered(5, seed=1), 3)


def test_what_cannot_be_written_is_an_error_of_the_system(tmp_path, monkeypatch):
    def full(*arguments):
        raise RuntimeError("write error in\nfaiss: No space left")

    monkeypatch.setattr(index_dense.faiss, "write_index", full)
    with pytest.raises(OSError, match="write error in faiss: No space left"):
        build(clustered(5)).save(tmp_path / "dense")


def changed(vectors, seed=5):
    """Half as many more vectors, a third of the old ones gone, all in another order: vectors, added ones, `rows`."""
    random = np.random.default_rng(seed)
    added = clustered(len(vectors) // 2, seed=seed)
    is_live = np.concatenate([random.random(len(vectors)) > 1 / 3, np.ones(len(added), bool)])
    rows = np.full(len(is_live), -1)
    rows[is_live] = random.permutation(is_live.sum())
    now = np.empty((is_live.sum(), vectors.shape[1]), np.float32)
    now[rows[is_live]] = np.concatenate([vectors, added])[is_live]
    return now, added, rows


@pytest.mark.parametrize(("kind", "bound"), [("hnsw", 0.98), ("ivfpq", 0.8)])
def test_passages_are_added_and_gone_without_a_new_graph_or_new_lists(approximate, kind, bound, tmp_path, monkeypatch):
    vectors, indexes = approximate
    indexes[kind].save(tmp_path / "before")
    for build_anew in ("_new_hnsw", "_build_ivfpq"):
        monkeypatch.setattr(index_dense, build_anew, None)
    now, added, rows = changed(vectors)
    DenseIndex.extend(tmp_path / "before", added, rows).save(tmp_path / "after")
    index, questions = DenseIndex.load(tmp_path / "after"), clustered(200)
    assert len(index) == len(now) and index.parameters["kind"] == kind
    np.testing.assert_array_equal(index.vectors_of(np.arange(len(now))), now)
    exact, hits = brute_force(now, questions, 10), found(index, questions, 10)
    for question, each in zip(questions, hits, strict=True):
        own_rows, scores = zip(*each, strict=True)
        np.testing.assert_allclose(scores, now[[*own_rows]] @ question, rtol=1e-5)
    share = np.mean(
        [len({row for row, _ in each} & {row for row, _ in best}) / 10 for each, best in zip(hits, exact, strict=True)]
    )
    assert share >= bound and index.recall() >= bound
    # And once more, after which what was there is where it was.
    now, added, rows = changed(index.vectors, seed=6)
    again = DenseIndex.extend(tmp_path / "after", added, rows)
    np.testing.assert_array_equal(again.vectors_of(np.arange(len(now))), now)
    assert again.recall() >= bound


@pytest.mark.parametrize(("kind", "bound"), [("hnsw", 0.98), ("ivfpq", 0.8)])
def test_where_all_that_is_near_a_question_has_gone_what_is_farther_is_found(approximate, kind, bound, tmp_path):
    vectors, indexes = approximate
    indexes[kind].save(tmp_path / "before")
    is_gone = np.zeros(len(vectors), bool)
    is_gone[np.argsort(-vectors @ vectors[0])[:2000]] = True
    rows = np.full(len(vectors), -1)
    rows[~is_gone] = np.arange(8000)
    index = DenseIndex.extend(tmp_path / "before", np.empty((0, 32), np.float32), rows)
    near, anywhere = vectors[is_gone][::50], vectors[::250]
    for questions in (near, anywhere):
        exact, hits = brute_force(vectors[~is_gone], questions, 20), found(index, questions, 20)
        shares = [
            len({row for row, _ in each} & {row for row, _ in best}) / 20
            for each, best in zip(hits, exact, strict=True)
        ]
        assert np.mean(shares) >= bound and {len(each) for each in hits} == {20}


def test_recall_is_also_of_questions_about_what_has_gone(approximate, tmp_path, monkeypatch):
    vectors, indexes = approximate
    indexes["hnsw"].save(tmp_path / "before")
    rows = np.arange(len(vectors)) - 2000  # the first 2,000 have gone
    index = DenseIndex.extend(tmp_path / "before", np.empty((0, 32), np.float32), np.maximum(rows, -1))
    asked = []

    def search(self, questions, top_k):
        asked.extend(questions)
        return whole_search(self, questions, top_k)

    whole_search = DenseIndex.search
    monkeypatch.setattr(DenseIndex, "search", search)
    assert index.recall() >= 0.98
    cosines = np.array(asked[:1000]) @ vectors.T
    assert 0.15 < np.mean(cosines.argmax(axis=1) < 2000) < 0.25
