"""The program around the rows: choosing, keeping and showing results."""

import json

import numpy as np
import pytest
import run
from measure import Result, Row

from mixlm.data.batching import LengthBucketedBatches, Position
from mixlm.errors import UserError

FIXED_NAMES = (
    "encoder_forward_8x128",
    "train_step_8x128",
    "train_step_2x512",
    "train_memory_1x2048",
    "train_step_vs_bert",
    "encoder_forward_compiled",
    "train_step_compiled",
    "switch_ffn_4_experts",
    "switch_ffn_32_over_4",
    "switch_ffn_4_experts_8x128",
    "switch_ffn_32_over_4_8x128",
    "mlm_head_time",
    "mlm_head_memory",
    "grad_cache_memory",
    "grad_cache_time",
    "grad_cache_max_diff",
    "padding_token_ratio",
    "padding_token_ratio_own_vocabulary",
    "padding_token_ratio_learned_vocabulary",
    "tokenize_rate_vs_raw",
    "tokenize_memory_8x_over_1x",
    "resume_first_batch_ratio",
    "data_wait_share",
)


def result(name: str, value: float = 2.0, target: str = ">= 1.5", shape: str = "8 x 128") -> Result:
    return Result(name, value, "x", target, shape, 1, 5)


def row(*names: str, value: float = 2.0) -> Row:
    return Row(names, lambda: [result(name, value) for name in names], dict.fromkeys(names, "time of something"))


def failing(name: str, error: Exception) -> Row:
    def measure():
        raise error

    return Row((name,), measure)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "README.md").write_text("# Title\n\n<!-- results -->\n<!-- end -->\n\nThe end.\n", "utf-8")
    return tmp_path


def kept(folder) -> dict[str, float]:
    return {entry["name"]: entry["value"] for entry in json.loads((folder / "results.json").read_text("utf-8"))}


class TestRegistry:
    def test_every_fixed_name_is_there_once_and_in_order(self):
        names = run.row_names(run.REGISTRY)
        assert len(names) == len(set(names))
        assert [name for name in names if name in FIXED_NAMES] == list(FIXED_NAMES)

    def test_every_row_says_what_it_is(self):
        assert all(row.description(name) for row in run.REGISTRY for name in row.names)


class TestChoosing:
    def test_an_unknown_name_is_one_line_with_the_nearest(self, capsys):
        with pytest.raises(SystemExit) as exit:
            run.main(["--only", "grad_cach_time"])
        assert exit.value.code == 2
        assert capsys.readouterr().err == "error: no row 'grad_cach_time'; did you mean grad_cache_time?\n"

    def test_a_name_like_no_other(self):
        with pytest.raises(UserError, match="no row 'xyz'; --list shows them"):
            run.require_known(["xyz"], run.REGISTRY)

    def test_update_goes_with_only(self, capsys):
        with pytest.raises(SystemExit):
            run.main(["--update"])
        assert "--update is for --only" in capsys.readouterr().err

    def test_the_list(self, capsys):
        assert run.main(["--list"]) == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == run.row_names(run.REGISTRY)

    def test_some_rows_alone_write_nothing(self, folder, capsys):
        before = (folder / "README.md").read_text("utf-8")
        assert run.run_rows(["b"], [row("a"), row("b", "c")], write=False, folder=folder) == 0
        output = capsys.readouterr().out
        assert "b, c ..." in output and "a ..." not in output
        assert "b: 2 x, target >= 1.5: met" in output
        assert [path.name for path in folder.iterdir()] == ["README.md"]
        assert (folder / "README.md").read_text("utf-8") == before


class TestKeeping:
    def test_an_update_leaves_the_others(self, folder):
        registry = [row("a"), row("b"), row("c")]
        run.run_rows(None, registry, write=True, folder=folder)
        run.run_rows(["b"], [registry[0], row("b", value=7.0), registry[2]], write=True, folder=folder)
        assert kept(folder) == {"a": 2.0, "b": 7.0, "c": 2.0}

    def test_a_whole_run_drops_what_no_longer_exists_and_sorts(self, folder):
        run.run_rows(None, [row("old"), row("b"), row("a")], write=True, folder=folder)
        run.run_rows(None, [row("a"), row("b")], write=True, folder=folder)
        assert list(kept(folder)) == ["a", "b"]
        assert "`old`" not in (folder / "README.md").read_text("utf-8")

    @pytest.mark.parametrize("error, code", [(RuntimeError("broken"), 1), (UserError("set MIXLM_DATA"), 2)])
    def test_a_row_that_fails_keeps_its_earlier_result_and_lets_the_others_go_on(self, folder, capsys, error, code):
        run.run_rows(None, [row("a"), row("b"), row("c")], write=True, folder=folder)
        registry = [row("a", value=3.0), failing("b", error), row("c", value=3.0)]
        assert run.run_rows(None, registry, write=True, folder=folder) == code
        assert kept(folder) == {"a": 3.0, "b": 2.0, "c": 3.0}
        assert "error: b: " in capsys.readouterr().err

    def test_a_killed_run_keeps_what_was_done(self, folder):
        with pytest.raises(KeyboardInterrupt):
            run.run_rows(None, [row("a"), failing("b", KeyboardInterrupt())], write=True, folder=folder)
        assert kept(folder) == {"a": 2.0}

    def test_a_row_must_give_what_it_names(self, folder, capsys):
        assert run.run_rows(["a"], [Row(("a", "b"), lambda: [result("a")])], write=True, folder=folder) == 1
        assert "the row of a, b gave a" in capsys.readouterr().err
        assert not (folder / "results.json").exists()

    def test_results_come_back_as_they_were_written(self, folder):
        run.keep({"a": result("a")}, [row("a")], folder)
        assert run.read_results(folder / "results.json") == {"a": result("a")}

    def test_a_damaged_file_is_a_one_line_error(self, folder):
        (folder / "results.json").write_text('[{"name": "a"}]', "utf-8")
        with pytest.raises(UserError, match="not a list of results"):
            run.read_results(folder / "results.json")

    def test_a_lost_place_of_the_table_is_named(self, folder):
        (folder / "README.md").write_text("nothing here", "utf-8")
        with pytest.raises(UserError, match="README.md: the place of results is lost"):
            run.keep({"a": result("a")}, [row("a")], folder)


class TestTable:
    def test_cells(self):
        results = [result("a"), result("b", 1.0), result("c", 12345.6, ""), result("d", 1.1e-7, "<= 1e-6", "2 | 3")]
        lines = run.table(results, [row("a", "b", "c", "d")]).splitlines()
        assert lines[0] == "| row | what | value | unit | target | met | shape | threads | pairs |"
        assert lines[1].count("|") == lines[0].count("|")
        assert lines[2:] == [
            "| `a` | time of something | **2** | x | >= 1.5 | yes | 8 x 128 | 1 | 5 |",
            "| `b` | time of something | **1** | x | >= 1.5 | no | 8 x 128 | 1 | 5 |",
            "| `c` | time of something | **12,346** | x |  |  | 8 x 128 | 1 | 5 |",
            r"| `d` | time of something | **1.1e-07** | x | <= 1e-6 | yes | 2 \| 3 | 1 | 5 |",
        ]

    def test_the_text_around_it_stays(self, folder):
        for value in (2.0, 3.0):
            run.keep({"a": result("a", value)}, [row("a")], folder)
        text = (folder / "README.md").read_text("utf-8")
        assert text.startswith("# Title\n\n<!-- results -->\n\n| row |")
        assert text.endswith("| 5 |\n\n<!-- end -->\n\nThe end.\n")
        assert text.count("`a`") == 1 and "**3**" in text

    def test_the_readme_shows_the_kept_results(self):
        """What is committed belongs together."""
        results = run.read_results(run.RESULTS)
        assert run.table(list(results.values()), run.REGISTRY) in run.README.read_text("utf-8") or not results


@pytest.mark.parametrize("rows, max_steps_per_epoch", [(1000, None), (530, None), (1000, 70)])
def test_the_position_of_a_step_is_where_walking_arrives(rows, max_steps_per_epoch):
    order = LengthBucketedBatches(np.full(rows, 10), seed=0, rows_per_step=4, max_steps_per_epoch=max_steps_per_epoch)
    walked = [Position()] + [after for after, _ in (step for step, _ in zip(order.steps(), range(600), strict=False))]
    assert [run.data_rows.position_at(step, order) for step in range(601)] == walked


def test_missing_data_says_what_to_set(monkeypatch, tmp_path):
    monkeypatch.setattr(run.data_rows, "DATA", tmp_path)
    with pytest.raises(UserError, match="set MIXLM_DATA"):
        run.data_rows.read_pairs()


def test_a_missing_compiler_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    names = ["encoder_forward_compiled", "train_step_compiled"]
    assert run.run_rows(names, run.REGISTRY, write=False) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == names
    assert all("no-such-compiler: no such C++ compiler" in line for line in lines)


def test_padding_is_counted_exactly():
    lengths = np.array([384, 192, 192, 96])
    # Two batches, padded to 384 and to 192; without buckets four rows of 384.
    assert run.data_rows.padded_token_ratio(lengths, [[0, 1], [2, 3]]) == 4 * 384 / (2 * 384 + 2 * 192)
