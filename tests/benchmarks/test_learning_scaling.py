"""Power laws of a study's losses."""

import numpy as np
import pytest
import report
import scaling
from lines import Line
from scaling import Point

SIZES, STEPS = (100_000, 400_000, 1_600_000), (1000, 3000, 9000)


def points_of(loss, sizes=SIZES, steps=STEPS) -> list[Point]:
    return [Point(size, 1000 * step, loss(size, 1000 * step), step) for size in sizes for step in steps]


def law(size: float, tokens: float) -> float:
    return 40 * size**-0.07 * tokens**-0.12


def lines_of(points: list[Point]) -> list[Line]:
    return [
        Line(
            f"MixLM, {number}",
            {
                1: {
                    "task": None,
                    "non_embedding_parameters": point.parameters,
                    "curve": [{"tokens": point.tokens}],
                    "metrics": {"mlm_loss": point.loss},
                    "steps": point.steps,
                }
            },
            3,
        )
        for number, point in enumerate(points)
    ]


def test_a_power_law_is_found():
    fitted = scaling.fit(points_of(law))
    assert -fitted.coefficients[1:] == pytest.approx([0.07, 0.12]) and fitted.deviation < 1e-9
    assert fitted.losses([Point(5000, 7000, 0.0, 1)]) == pytest.approx([law(5000, 7000)])


def test_its_standard_errors_are_those_of_a_textbook():
    """With the sizes and budgets in a grid, the exponent of the tokens is a simple regression: its error is
    the deviation over the root of the sum of squared logarithms."""
    generator = np.random.default_rng(1)
    points = points_of(lambda *place: law(*place) * np.exp(generator.normal(0, 0.02)))
    fitted = scaling.fit(points)
    logarithms = np.log([point.tokens for point in points])
    squares = ((logarithms - logarithms.mean()) ** 2).sum()
    assert fitted.covariance[2, 2] ** 0.5 == pytest.approx(fitted.deviation / squares**0.5)
    near, far = (fitted.predict(np.array([400_000]), np.array([tokens]))[1][0] for tokens in (3e6, 3e9))
    assert fitted.deviation < near < far  # a new run is less sure than the law, and more so in the distance


def test_there_is_no_law_of_one_budget():
    assert scaling.fit(points_of(law, steps=(1000,))) is None
    assert scaling.fit(points_of(law)[:3]) is None
    assert scaling.errors_beyond(points_of(law, steps=(1000, 9000))) == []


def test_what_bends_is_seen_in_the_prediction_of_the_most_steps():
    assert scaling.errors_beyond(points_of(law)) == pytest.approx([0, 0, 0])
    ended = scaling.errors_beyond(points_of(lambda size, tokens: law(size, min(tokens, 3_000_000))))
    assert ended == pytest.approx([3**0.12 - 1] * 3)  # losses that no longer fall


def test_each_size_has_its_own_longest_run():
    """One that had to stop earlier is not among those that the law is made of."""
    points = [
        point._replace(steps=8000) if (point.parameters, point.steps) == (SIZES[-1], 9000) else point
        for point in points_of(law)
    ]
    assert len(scaling.errors_beyond(points)) == len(SIZES)
    alone = Point(50_000, 1_000_000, law(50_000, 1e6), 1000)  # the only run of its size is no prediction
    assert len(scaling.errors_beyond([alone, *points])) == len(SIZES)


def test_the_tables_say_what_was_measured_and_what_the_law_says():
    (row, *_), lines = scaling.rows_of_laws(lines_of(points_of(law))), lines_of(points_of(law))
    assert row == {
        "": "MixLM",
        "runs": 9,
        "exponent of size": "0.070 ± 0.000",
        "exponent of tokens": "0.120 ± 0.000",
        "deviation": "0.0%",
        "most steps, predicted": row["most steps, predicted"],
    }
    assert row["most steps, predicted"].replace("-", "+") == "+0.0% to +0.0%"
    first = scaling.rows_of_runs(lines)[0]
    assert first["parameters"] == "100,000" and first["tokens seen"] == "1,000k"
    assert first["held-out loss (nats)"] == first["the law says"] == f"{law(100_000, 1_000_000):.3f}"
    assert "| MixLM, 0 | 1 of 3 | 1,000 |" in report.markdown(lines, scaling.rows_of_runs)


def test_few_runs_have_a_table_and_a_figure_without_a_law(tmp_path):
    lines = [*lines_of(points_of(law)[:1]), Line("BERT, 64", {}, 3)]
    assert scaling.rows_of_runs(lines[:1])[0]["the law says"] == ""
    assert scaling.rows_of_laws(lines) == [
        {
            "": "MixLM",
            "runs": 1,
            **dict.fromkeys(("exponent of size", "exponent of tokens", "deviation", "most steps, predicted"), ""),
        }
    ]
    scaling.draw_scaling(lines, tmp_path / "few.png")
    scaling.draw_scaling(lines_of(points_of(law)), tmp_path / "law.png")
    assert (tmp_path / "law.png").stat().st_size > (tmp_path / "few.png").stat().st_size > 5000
