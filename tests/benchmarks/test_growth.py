"""The study of growth: exponents, what is kept, and which series are measured."""

import json
from dataclasses import replace

import growth
import pages
import pytest
from growth import SERIES, Plan, Point

from mixlm import MixLMConfig
from mixlm.errors import UserError


def points(name: str, time: float = 1.0, memory: float = 2.0) -> list[Point]:
    """Costs that grow with these powers of the value; parameters grow linearly."""
    return [Point(value, 1e-3 * value**time, round(1e4 * value**memory), 100 * value) for value in SERIES[name].values]


class Measured:
    """Stands in for the measurement and remembers what it was asked for."""

    def __init__(self, fails_at: str = ""):
        self.names, self.fails_at = [], fails_at

    def __call__(self, name: str, steps: int) -> list[Point]:
        if name == self.fails_at:
            raise KeyboardInterrupt
        self.names.append(name)
        return points(name)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("# Title\n\n<!-- growth -->\n<!-- end -->\n\nThe end.\n", "utf-8")
    monkeypatch.setattr(growth, "draw", lambda kept, out: out.write_text(", ".join(kept), "utf-8"))
    return tmp_path


class TestExponents:
    @pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
    def test_of_a_power_law(self, power):
        values = [3, 6, 12, 24]
        exponent, factor = growth.power_law(values, [7 * value**power for value in values])
        assert exponent == pytest.approx(power, abs=1e-12)
        assert factor == pytest.approx(7)

    def test_of_all_quantities(self):
        found = growth.exponents(points("length", time=1.5, memory=0.5))
        assert found["seconds"] == pytest.approx({"all": 1.5, "last_doubling": 1.5})
        assert found["memory"] == pytest.approx({"all": 0.5, "last_doubling": 0.5}, abs=1e-4)
        assert found["parameters"] == pytest.approx({"all": 1.0, "last_doubling": 1.0})

    def test_the_last_doubling_sees_through_what_does_not_grow(self):
        found = growth.exponents([replace(point, seconds=10 + point.seconds) for point in points("experts", time=2)])
        assert found["seconds"]["all"] < found["seconds"]["last_doubling"] < 2


class TestSeries:
    def test_values_double(self):
        for series in SERIES.values():
            assert all(2 * small == large for small, large in zip(series.values, series.values[1:], strict=False))
        ends = {name: (series.values[0], series.values[-1]) for name, series in SERIES.items()}
        assert ends == {
            "length": (128, 4096),
            "layers": (3, 24),
            "experts": (4, 128),
            "vocabulary": (8000, 128000),
        }

    def test_only_one_number_differs(self):
        fields = {"layers": "num_hidden_layers", "experts": "n_experts", "vocabulary": "vocab_size"}
        for name, series in SERIES.items():
            plans = [series.plan(value) for value in series.values]
            assert len({plan.rows * plan.length for plan in plans}) == 1
            differing = set()
            for plan in plans[1:]:
                mine, first = plan.config.to_dict(), plans[0].config.to_dict()
                differing |= {field for field in mine if mine[field] != first[field]}
            assert differing == ({fields[name]} if name in fields else set())
            assert all(plan.length <= plan.config.max_position_embeddings for plan in plans)
            assert all(plan.config.layer_group == 3 for plan in plans)

    def test_explanations_take_one_line(self):
        assert all(series.explanation and "\n" not in series.explanation for series in SERIES.values())

    @pytest.mark.parametrize("family", ["mixlm", "mixlm-switch"])
    def test_a_step_trains(self, family):
        config_class = MixLMConfig if family == "mixlm" else growth.MixLMSwitchConfig
        config = config_class.from_preset(
            f"{family}-mini", num_hidden_layers=1, layer_group=1, hidden_size=64, ff_dim=64, vocab_size=50
        )
        step, parameters = growth.build_step(Plan(config, 2, 16))
        step()
        assert parameters == sum(p.numel() for p in growth.build_model(Plan(config, 2, 16)).parameters())


class TestKeeping:
    def test_the_table_has_both_ends_and_exponents(self):
        text = growth.table({"length": points("length", 1.0, 2.0)})
        row = next(line for line in text.splitlines() if line.startswith("| **length**"))
        assert "| 128 to 4,096 | 0.13 to 4.10 | **1.00** (1.00) |" in row
        assert "**2.00** (2.00)" in row
        header, rule, *_ = text.splitlines()
        assert header.count("|") == rule.count("|") == row.count("|")
        assert text.endswith(SERIES["length"].explanation)

    def test_points_come_back_and_the_readme_around_stays(self, folder):
        for _ in range(2):  # the second time there is a table already
            growth.keep({"layers": points("layers"), "length": points("length")}, folder)
        assert growth.read_points(folder / "growth.json") == {"length": points("length"), "layers": points("layers")}
        text = (folder / "README.md").read_text("utf-8")
        assert text.startswith("# Title\n\n<!-- growth -->\n\n| series |")
        assert text.endswith("![How cost grows](growth.png)\n\n<!-- end -->\n\nThe end.\n")
        assert text.count("| **length** |") == 1
        assert json.loads((folder / "growth.json").read_text("utf-8"))["length"]["exponents"]["seconds"]["all"] == (
            pytest.approx(1.0)
        )
        assert sorted(path.name for path in folder.iterdir()) == ["README.md", "growth.json", "growth.png"]

    def test_a_damaged_file_is_a_one_line_error(self, folder):
        (folder / "growth.json").write_text('{"length": {}}', "utf-8")
        with pytest.raises(UserError, match="not the points of series"):
            growth.read_points(folder / "growth.json")

    def test_the_committed_readme_has_a_place(self):
        page = (growth.FOLDER / growth.README).read_text("utf-8")
        assert "block" in pages.replaced(page, growth.PLACE, "block")

    def test_the_picture(self, tmp_path):
        pyplot = pytest.importorskip("matplotlib.pyplot")
        growth.draw({"length": points("length"), "vocabulary": points("vocabulary")}, tmp_path / "growth.png")
        height, width, _ = pyplot.imread(tmp_path / "growth.png").shape
        assert width == 1200 and height > 600


class TestWhichSeries:
    def test_a_killed_run_goes_on(self, folder):
        first, second = Measured(fails_at="experts"), Measured()
        with pytest.raises(KeyboardInterrupt):
            growth.run_series(list(SERIES), 3, again=False, folder=folder, measure=first)
        assert list(growth.read_points(folder / "growth.json")) == first.names == ["length", "layers"]
        growth.run_series(list(SERIES), 3, again=False, folder=folder, measure=second)
        assert second.names == ["experts", "vocabulary"]
        assert list(growth.read_points(folder / "growth.json")) == list(SERIES)

    def test_again_measures_what_is_there_and_only_what_is_named(self, folder):
        growth.run_series(["length", "layers"], 3, again=False, folder=folder, measure=Measured())
        measured = Measured()
        growth.run_series(["layers"], 3, again=True, folder=folder, measure=measured)
        assert measured.names == ["layers"]
        assert list(growth.read_points(folder / "growth.json")) == ["length", "layers"]

    def test_too_few_steps(self, capsys):
        with pytest.raises(SystemExit) as exit:
            growth.main(["--steps", "2"])
        assert exit.value.code == 2
        assert capsys.readouterr().err == "error: --steps 2: a median needs at least 3\n"
