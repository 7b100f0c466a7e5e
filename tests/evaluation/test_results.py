"""Records, tables and the plot of results."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from titan_peer.evaluation.results import Result, _figure, _series, history_table, plot_history, result_table

GOOD = Result("evals", "test-match", {"accuracy": 0.25, "bootstrap_std": 0.1}, samples=1200, seconds=3.21)
BAD = Result("tasks", "a|b", error="KeyError: 'x'\nsecond line")


def test_a_record_has_one_flat_key_a_metric():
    assert GOOD.record() == {
        "evaluation/evals/test-match/accuracy": 0.25,
        "evaluation/evals/test-match/bootstrap_std": 0.1,
        "evaluation/evals/test-match/samples": 1200,
    }
    assert BAD.record() == {"evaluation/tasks/a|b/failed": 1.0}
    assert Result("evals", "e", {"accuracy": math.nan}).record() == {}
    assert Result("evals", "e", error="told to stop", stopped=True).record() == {}


def test_the_table_shows_numbers_and_failures():
    table = result_table([GOOD, BAD]).splitlines()
    assert len({len(line) for line in table}) == 1
    assert "0.2500 ± 0.1000" in table[2] and "1,200" in table[2] and "3.2" in table[2]
    assert "failed" in table[3] and "KeyError: 'x'" in table[3] and "a\\|b" in table[3]


def test_a_value_stands_with_its_own_standard_error():
    metrics = {"exact_match (strict)": 0.5, "exact_match_stderr (strict)": 0.05, "acc": 0.2, "acc_stderr": math.nan}
    metrics |= {"accuracy_by_log_likelihood": 0.7, "bootstrap_std_by_log_likelihood": 0.02}
    result = Result("tasks", "t", metrics, samples=40)
    values = [line.split("|")[4].strip() for line in result_table([result]).splitlines()[2:]]
    assert values == ["0.5000 ± 0.0500", "0.2000", "0.7000 ± 0.0200"]
    in_history = [line.split("|")[4:6] for line in history_table([{"step": 1, **result.record()}]).splitlines()[2:]]
    assert [[cell.strip() for cell in cells] for cells in in_history] == [["40 samples", value] for value in values]


def test_the_history_has_a_column_a_step_and_the_newest_ones_only():
    records = [{"step": 10, "loss": 3.0}]
    records += [{"step": s, **Result("tasks", "t", {"acc": s / 100}, samples=s - 23).record()} for s in (10, 20, 30)]
    table = history_table(records, max_steps=2).splitlines()
    assert "step 20" in table[0] and "step 30" in table[0] and "step 10" not in table[0]
    cells = [cell.strip() for cell in table[2].split("|")[1:-1]]
    assert cells == ["tasks", "t", "acc", "7 samples", "0.2000", "0.3000"]


def test_the_plot_shows_standard_errors_and_numbers_of_samples():
    records = [{"step": s, **GOOD.record()} for s in (1, 2)]
    records[0] |= Result("perplexity", "held out", {"loss": 3.0}, samples=5000).record()
    accuracy, loss = _figure(_series(records)).axes
    (bars,) = accuracy.collections
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [pytest.approx([0.15, 0.35])] * 2
    assert accuracy.get_title() == "test-match\naccuracy, 1,200 samples"
    assert not loss.collections and loss.get_title() == "held out\nloss, 5,000 tokens"


def test_the_plot_is_a_picture_and_absent_without_evaluations(tmp_path: Path):
    plot_history([{"step": 1, "loss": 2.0}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    plot_history([{"step": s, **GOOD.record()} for s in (1, 2)], tmp_path / "some.png")
    assert (tmp_path / "some.png").read_bytes()[:4] == b"\x89PNG"
