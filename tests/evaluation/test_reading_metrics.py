"""EM and F1 of reading against numbers worked out by hand, and the metrics as modules of `evaluate`."""

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mixlm.errors import UserError
from mixlm.evaluation import METRICS, metric_path
from mixlm.evaluation.reading import (
    count_korean,
    korquad_characters,
    korquad_v1,
    normalize_korquad,
    normalize_squad,
    records_by_id,
    score_korquad_v1,
    score_squad_v1,
    score_squad_v2,
    squad_v1,
    squad_v2,
    squad_words,
    usual_metric,
)

REPOSITORY = Path(__file__).parent.parent.parent
PROPERTY = settings(derandomize=True, deadline=None, database=None, max_examples=150)

SCORES_AND_UNITS = pytest.mark.parametrize(
    ("score", "units"),
    [(score_squad_v1, squad_words), (score_squad_v2, squad_words), (score_korquad_v1, korquad_characters)],
)
# Short texts of few characters, so that equal words, marks, articles and empty texts all come up.
TEXTS = st.one_of(st.text("ab 가나,.('《", max_size=12), st.text(max_size=12))
REFERENCES = st.lists(TEXTS, min_size=1, max_size=4)


class TestNormalizing:
    @pytest.mark.parametrize(
        ("text", "normalized"),
        [
            ("The  Eiffel-Tower!", "eiffeltower"),
            ("an apple\tA day", "apple day"),
            ("another theatre, a", "another theatre"),
            ("A.", ""),  # punctuation goes first, so that this is an article
            ("“quoted”", "“quoted”"),  # not ASCII
            ("a\u00a0b", "b"),
            ("", ""),
        ],
    )
    def test_squad(self, text, normalized):
        assert normalize_squad(text) == normalized

    @pytest.mark.parametrize(
        ("text", "normalized"),
        [
            ("《훈민정음》", "훈민정음"),
            ("세종(世宗)은", "세종 世宗 은"),
            ("〈봄〉 <여름> ‘가을’ '겨울' \"끝\"", "봄 여름 가을 겨울 끝"),
            ("1,000.5%", "10005"),  # these leave no gap
            ("[가]나-다", "가나다"),
            ("The IBM", "the ibm"),  # articles stay
            ("“인용” 「책」（괄호） 가·나", "“인용” 「책」（괄호） 가·나"),  # the official script leaves these
            ("  대한\n민국 ", "대한 민국"),
            ("()", ""),
        ],
    )
    def test_korquad(self, text, normalized):
        assert normalize_korquad(text) == normalized


class TestOneAnswer:
    @pytest.mark.parametrize(
        ("prediction", "references", "exact", "f1"),
        [
            ("The Denver Broncos", ["denver broncos."], 1, 1),
            ("Broncos", ["Denver Broncos"], 0, 2 / 3),  # precision 1, recall 1/2
            ("in Santa Clara, California", ["Santa Clara", "Santa Clara California"], 0, 6 / 7),  # 3 of 4 and 3 of 3
            ("gold gold silver", ["gold silver silver"], 0, 2 / 3),  # gold and silver count once each
            ("blue", ["red", "green"], 0, 0),
            ("", ["red"], 0, 0),
            ("the", ["a"], 1, 0),  # equal, but nothing in common: so does the official script
            ("서울에서", ["서울"], 0, 0),  # one word against another
        ],
    )
    def test_squad_v1(self, prediction, references, exact, f1):
        assert score_squad_v1(prediction, references) == (exact, pytest.approx(f1))

    @pytest.mark.parametrize(
        ("prediction", "references", "exact", "f1"),
        [
            ("", [], 1, 1),
            ("the", [], 1, 1),
            ("red", [], 0, 0),
            ("", ["red"], 0, 0),
            ("", ["the", "red"], 0, 0),  # "the" is no answer beside another
            ("", ["the"], 1, 1),  # and none at all where it is alone
            ("dark red", ["red"], 0, 2 / 3),
        ],
    )
    def test_squad_v2(self, prediction, references, exact, f1):
        assert score_squad_v2(prediction, references) == (exact, pytest.approx(f1))

    @pytest.mark.parametrize(
        ("prediction", "references", "exact", "f1"),
        [
            ("《훈민정음》", ["훈민정음"], 1, 1),
            ("'세종'", ["‘세종’"], 1, 1),
            ("서울에서", ["서울"], 0, 2 / 3),  # 2 of 4 and 2 of 2 characters
            ("세종대왕", ["세종 대왕"], 0, 1),  # a blank is no character, but it is a difference
            ("왕대종세", ["세종대왕"], 0, 1),  # order does not count
            ("세종(世宗)", ["세종", "世宗 세종"], 0, 1),
            ("세종(世宗)", ["이도", "세종"], 0, 2 / 3),  # 2 of 4 and 2 of 2
            ("1,000명", ["1000명"], 1, 1),
            ("", ["서울"], 0, 0),
            ("서울", [""], 0, 0),
            ("", ["()"], 1, 0),
        ],
    )
    def test_korquad_v1(self, prediction, references, exact, f1):
        assert score_korquad_v1(prediction, references) == (exact, pytest.approx(f1))

    @SCORES_AND_UNITS
    @PROPERTY
    @given(reference=TEXTS, others=st.lists(TEXTS, max_size=3))
    def test_a_reference_scores_full_against_itself(self, score, units, reference, others):
        assume(units(reference))
        assert score(reference, [*others, reference]) == (1, 1)

    @SCORES_AND_UNITS
    @PROPERTY
    @given(prediction=TEXTS, references=REFERENCES)
    def test_f1_is_never_less_than_em(self, score, units, prediction, references):
        exact, f1 = score(prediction, references)
        assert exact in (0, 1) and 0 <= f1 <= 1
        if units(prediction) or score is score_squad_v2:
            assert f1 >= exact

    @SCORES_AND_UNITS
    @PROPERTY
    @given(prediction=TEXTS, references=REFERENCES, data=st.data())
    def test_the_order_of_references_does_not_count(self, score, units, prediction, references, data):
        assert score(prediction, references) == score(prediction, data.draw(st.permutations(references)))

    @SCORES_AND_UNITS
    @PROPERTY
    @given(prediction=TEXTS, reference=TEXTS)
    def test_blanks_around_and_case_do_not_count(self, score, units, prediction, reference):
        # A few characters have no way back from upper case.
        assume(prediction.upper().lower() == prediction.lower())
        assert score(prediction, [reference]) == score(f" {prediction.upper()}\n", [reference])


class TestAnswerableQuestions:
    @pytest.mark.parametrize("metric", [squad_v1, korquad_v1])
    def test_mean_over_questions_in_percent(self, metric):
        predictions = {"1": "red", "2": "b c", "3": "x"}
        references = {"1": ["green", "red"], "2": ["b"], "3": ["y"]}
        assert metric(predictions, references) == {
            "exact_match": pytest.approx(100 / 3),
            "f1": pytest.approx(100 * (1 + 2 / 3) / 3),
            "total": 3,
            "missing": 0,
        }

    def test_they_differ_where_the_data_sets_do(self):
        predictions, references = {"1": "서울에서", "2": "The end"}, {"1": ["서울"], "2": ["end"]}
        assert squad_v1(predictions, references)["f1"] == 50
        # "theend" and "end": 3 of 6 and 3 of 3.
        assert korquad_v1(predictions, references)["f1"] == pytest.approx(100 * 2 / 3)

    @pytest.mark.parametrize("metric", [squad_v1, korquad_v1])
    def test_missing_predictions_score_nothing_and_are_counted(self, metric):
        result = metric({"1": "red", "unknown": "blue"}, {"1": ["red"], "2": ["red"], "3": [""], "4": ["b"]})
        assert result == {"exact_match": 25, "f1": 25, "total": 4, "missing": 3}

    @pytest.mark.parametrize("metric", [squad_v1, korquad_v1])
    def test_user_errors(self, metric):
        with pytest.raises(UserError, match="no questions"):
            metric({"1": "red"}, {})
        with pytest.raises(UserError, match="question '2' has no reference answer"):
            metric({"1": "red"}, {"1": ["red"], "2": []})


class TestUnanswerableQuestions:
    PREDICTIONS = {"a": "red", "b": "dark blue", "c": "green", "d": "", "e": "grey"}
    REFERENCES = {"a": ["red"], "b": ["blue"], "c": [], "d": [], "e": []}

    def test_without_scores(self):
        assert squad_v2(self.PREDICTIONS, self.REFERENCES) == {
            "exact": pytest.approx(40),  # a and d
            "f1": pytest.approx(100 * (1 + 2 / 3 + 1) / 5),
            "total": 5,
            "HasAns_exact": 50,
            "HasAns_f1": pytest.approx(100 * (1 + 2 / 3) / 2),
            "HasAns_total": 2,
            "NoAns_exact": pytest.approx(100 / 3),
            "NoAns_f1": pytest.approx(100 / 3),
            "NoAns_total": 3,
            "missing": 0,
        }

    def test_threshold(self):
        scores = {"a": 0.2, "b": 2.0, "c": 1.5, "d": 0.0, "e": 1.0}
        result = squad_v2(self.PREDICTIONS, self.REFERENCES, scores)
        # Above 1.0, not at it: b becomes wrong, c right; e stays wrong.
        assert (result["exact"], result["HasAns_f1"], result["NoAns_exact"]) == pytest.approx((60, 50, 200 / 3))
        result = squad_v2(self.PREDICTIONS, self.REFERENCES, scores, no_answer_threshold=0.5)
        assert (result["exact"], result["NoAns_exact"]) == (80, 100)

    def test_best_thresholds(self):
        # Nothing answered: 3 right. a: 4 exact. d: none either way. b: 4 exact, 4 2/3 F1. c and e: one less each.
        scores = {"a": -3.0, "b": -1.0, "c": 0.5, "d": -2.0, "e": 2.0}
        result = squad_v2(self.PREDICTIONS, self.REFERENCES, scores)
        assert (result["best_exact"], result["best_exact_thresh"]) == (80, -3.0)
        assert (result["best_f1"], result["best_f1_thresh"]) == (pytest.approx(100 * (4 + 2 / 3) / 5), -1.0)
        for name in ("exact", "f1"):
            at_best = squad_v2(self.PREDICTIONS, self.REFERENCES, scores, result[f"best_{name}_thresh"])
            assert at_best[name] == pytest.approx(result[f"best_{name}"])

    def test_best_where_nothing_is_answered(self):
        result = squad_v2({"a": "red", "c": "green"}, {"a": ["blue"], "c": []}, {"a": -2.0, "c": -1.0})
        assert (result["best_exact"], result["best_exact_thresh"]) == (50, 0.0)

    def test_equal_scores_are_taken_one_by_one(self):
        """As in the official script: no threshold answers a and not c."""
        result = squad_v2({"a": "red", "c": "green"}, {"a": ["red"], "c": []}, {"a": 0.5, "c": 0.5})
        assert (result["best_exact"], result["best_exact_thresh"]) == (100, 0.5)
        assert squad_v2({"a": "red", "c": "green"}, {"a": ["red"], "c": []}, {"c": 0.5, "a": 0.5})["best_exact"] == 50

    def test_missing_predictions_score_nothing_at_any_threshold(self):
        references = {"a": ["red"], "b": ["red"], "c": [], "d": []}
        result = squad_v2({"a": "red", "c": ""}, references, {"a": 0.0, "c": 0.0, "d": 0.0, "unknown": 0.0})
        assert result == {
            "exact": 50,
            "f1": 50,
            "total": 4,
            "HasAns_exact": 50,
            "HasAns_f1": 50,
            "HasAns_total": 2,
            "NoAns_exact": 50,
            "NoAns_f1": 50,
            "NoAns_total": 2,
            "missing": 2,
            "best_exact": 50,
            "best_exact_thresh": 0.0,
            "best_f1": 50,
            "best_f1_thresh": 0.0,
        }

    def test_one_kind_of_question_alone(self):
        assert not any(name.startswith("NoAns") for name in squad_v2({"a": "red"}, {"a": ["red"]}))
        assert not any(name.startswith("HasAns") for name in squad_v2({"c": ""}, {"c": []}))

    def test_user_errors(self):
        with pytest.raises(UserError, match="no questions"):
            squad_v2({}, {})
        for scores in ({}, {"a": float("nan")}):
            with pytest.raises(UserError, match="question 'a' has a prediction, but no number"):
                squad_v2({"a": "red"}, {"a": ["red"]}, scores)

    @PROPERTY
    @given(
        questions=st.dictionaries(
            st.integers(0, 9).map(str),
            st.tuples(TEXTS, st.lists(TEXTS, max_size=2), st.floats(-5, 5)),
            min_size=1,
        ),
        threshold=st.floats(-6, 6),
    )
    def test_no_threshold_beats_the_best(self, questions, threshold):
        predictions = {question: prediction for question, (prediction, _, _) in questions.items()}
        # Where a model answers an unanswerable question by punctuation alone, the official best calls that wrong.
        assume(all(not prediction or normalize_squad(prediction) for prediction in predictions.values()))
        # And where all references are articles or punctuation, no answer is right but not counted so.
        references = {
            question: [answer for answer in answers if normalize_squad(answer)]
            for question, (_, answers, _) in questions.items()
        }
        scores = {question: score for question, (_, _, score) in questions.items()}
        result = squad_v2(predictions, references, scores, threshold)
        assert result["exact"] <= result["best_exact"] + 1e-9
        assert result["f1"] <= result["best_f1"] + 1e-9


def test_records_by_id():
    records = [{"id": "1", "text": "a"}, {"id": "2", "text": "b"}, {"id": "1", "text": "a"}]
    assert records_by_id(records, lambda record: record["text"]) == {"1": "a", "2": "b"}
    with pytest.raises(UserError, match="question '1' comes twice"):
        records_by_id([*records, {"id": "1", "text": "c"}], lambda record: record["text"])


@pytest.mark.parametrize(
    ("contexts", "korean", "name"),
    [
        (["세종", "King Sejong", unicodedata.normalize("NFD", "한글")], 2, "korquad_v1"),
        (["Sejong (세종)", "Seoul", "서울", "Busan"], 2, "squad_v1"),  # not most of them
        (["世宗", "セジョン"], 0, "squad_v1"),
        ([], 0, "squad_v1"),
    ],
)
def test_korquad_is_usual_where_most_texts_have_hangul(contexts, korean, name):
    assert (count_korean(contexts), usual_metric(contexts)) == (korean, name)


class TestModules:
    QUESTIONS = {
        # id: prediction, references, no-answer score
        "1": ("‘세종’", ["이도", "세종"], 0.1),
        "2": ("the dark red", ["red"], 0.2),
        "3": ("", ["blue"], 0.3),
    }
    UNANSWERABLE = {"4": ("x", [], 2.0)}
    PROGRAM = """
import json, socket, sys
def refuse(*arguments):
    raise AssertionError("the network was asked for")
socket.socket.connect = socket.getaddrinfo = refuse
import evaluate
print(json.dumps({name: evaluate.load(path).compute(**records) for name, path, records in json.load(sys.stdin)}))
"""

    def questions_of(self, name: str) -> dict:
        return self.QUESTIONS | (self.UNANSWERABLE if name == "squad_v2" else {})

    def records(self, name: str) -> dict[str, list]:
        predictions, references = [], []
        for question, (prediction, answers, score) in self.questions_of(name).items():
            # A prediction for another question, so that one is missing.
            predictions.append({"id": "else" if question == "3" else question, "prediction_text": prediction})
            if name == "squad_v2":
                predictions[-1]["no_answer_probability"] = score
            references.append({"id": question, "answers": {"text": answers, "answer_start": [0] * len(answers)}})
        return {"predictions": predictions, "references": references}

    @pytest.fixture(scope="class")
    def computed(self, tmp_path_factory) -> dict[str, dict]:
        """What the three modules compute in a process that has an empty cache and no network."""
        folder = tmp_path_factory.mktemp("evaluate")
        environment = os.environ | {
            "HF_HOME": str(folder),
            "HF_HUB_OFFLINE": "1",
            "HF_EVALUATE_OFFLINE": "1",
            "PYTHONPATH": str(REPOSITORY),
        }
        process = subprocess.run(
            [sys.executable, "-c", self.PROGRAM],
            input=json.dumps([(name, metric_path(name), self.records(name)) for name in METRICS]),
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout)

    @pytest.mark.parametrize("name", METRICS)
    def test_they_compute_what_the_functions_do(self, name, computed):
        questions = self.questions_of(name)
        predictions = {question: text for question, (text, _, _) in questions.items() if question != "3"}
        references = {question: answers for question, (_, answers, _) in questions.items()}
        arguments = {}
        if name == "squad_v2":
            arguments["no_answer_scores"] = {question: score for question, (_, _, score) in questions.items()}
        function = {"squad_v1": squad_v1, "squad_v2": squad_v2, "korquad_v1": korquad_v1}[name]
        assert computed[name] == function(predictions, references, **arguments)
        assert computed[name]["missing"] == 1

    def test_paths(self):
        for name in METRICS:
            assert (Path(metric_path(name)) / f"{name}.py").is_file()
        with pytest.raises(UserError, match="no metric 'bleu'; there are squad_v1, squad_v2, korquad_v1"):
            metric_path("bleu")

    def test_the_functions_do_without_evaluate(self):
        program = (
            "import sys; sys.modules['evaluate'] = None\n"
            "from mixlm.evaluation.reading import korquad_v1\n"
            "print(korquad_v1({'1': '가'}, {'1': ['가']})['f1'])"
        )
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        process = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
        )
        assert process.stdout == "100.0\n", process.stderr
