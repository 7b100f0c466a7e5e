"""What an ablation reports of its runs: tables, and plots in which a design looks the same everywhere."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from plans import ROOT, finished, plan

from titan_peer.ablation.plots import design_styles, loss_curves, loss_scaling, panels, sweep_plot, sweeps
from titan_peer.ablation.results import by_point, results_csv, results_markdown


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_a_best_design_of_one_seed_is_said_to_be_maybe_chance(tmp_path: Path) -> None:
    found = plan(tmp_path, "selection_heads=2", tokens=8192)
    results = finished(found, {"base,seed=0": 5.0, "selection_heads=2,seed=0": 4.9})
    text = results_markdown(found, results, "title")
    best = "**selection_heads = 2**, loss 4.9000. That is 0.1000 lower than the next, base, from one seed"
    assert f"Best: {best}" in text
    assert text.count("from one seed, so it may be chance") == 2  # over all, and for the axis


@pytest.mark.parametrize(("better", "words"), [(4.99, "no more than"), (4.0, "more than")])
def test_a_best_design_of_several_seeds_is_held_against_their_deviation(
    better: float, words: str, tmp_path: Path
) -> None:
    found = plan(tmp_path, "selection_heads=2", tokens=8192, seeds=[0, 1])
    losses = {"base,seed=0": 5.0, "base,seed=1": 5.1}
    losses |= {"selection_heads=2,seed=0": better, "selection_heads=2,seed=1": better + 0.1}
    text = results_markdown(found, finished(found, losses), "title")
    gap = 5.0 - better
    assert f"That is {gap:.4f} lower than the next, base, " in text
    assert f"{words} the standard deviation over seeds (0.0707)" in text


def test_speeds_of_runs_that_shared_the_cores_are_marked(tmp_path: Path) -> None:
    losses = {"base,seed=0": 5.0, "selection_heads=2,seed=0": 4.9}
    alone = plan(tmp_path / "alone", "selection_heads=2", tokens=8192)
    text = results_markdown(alone, finished(alone, losses, beside=0), "title")
    assert "| 1,003 |" in text and "same cores" not in text  # the median of steps 2 to 4; step 1 compiles
    shared = plan(tmp_path / "shared", "selection_heads=2", tokens=8192)
    results = finished(shared, losses, beside=3)
    text = results_markdown(shared, results, "title")
    assert "| 1,003* |" in text
    assert "trained with up to 3 other runs on the same cores; such speeds cannot be compared" in text
    assert [row["other_runs_on_the_cores"] for row in csv.DictReader(results_csv(shared, results).splitlines())] == [
        "3",
        "3",
    ]


def test_a_design_has_one_colour_in_all_panels_of_both_plots(tmp_path: Path) -> None:
    found = plan(tmp_path, "selection_heads=2", "optimizer.lr=1e-3,3e-3", tokens=8192)
    losses = {run.name: 5.0 - i / 10 for i, run in enumerate(found.runs)}
    points = by_point(finished(found, losses))
    styles = design_styles([point.point for point in points])
    drawn: dict[str, set[object]] = {}
    for axes in loss_curves(panels(found, points), styles).axes:
        for line in axes.lines:
            if line.get_linestyle() != "None":
                value = line.get_label().removesuffix(" (base)")
                axis = axes.get_title()
                drawn.setdefault(found.axes[axis][value], set()).add(to_hex(line.get_color()))
    for axes in loss_scaling(points, styles).axes:
        for container in axes.containers:
            drawn.setdefault(container.get_label(), set()).add(to_hex(container.lines[0].get_color()))
    assert drawn.keys() == {"base", "selection_heads = 2", "optimizer.lr = 1e-3"}
    assert all(len(colours) == 1 for colours in drawn.values())
    assert len(set.union(*drawn.values())) == 3


def test_a_sweep_shows_the_numbers_of_an_axis_in_order_with_the_base_job_among_them(tmp_path: Path) -> None:
    found = plan(tmp_path, "selection_heads=2", "optimizer.lr=1e-2,1e-3", tokens=8192)
    losses = {"base,seed=0": 5.0, "selection_heads=2,seed=0": 4.9}
    losses |= {"optimizer.lr=1e-2,seed=0": 5.3, "optimizer.lr=1e-3,seed=0": 5.1}
    of_axes = sweeps(found, by_point(finished(found, losses)))
    shown = {
        axis: [[(value, point.mean) for value, point in line] for line in lines.values()]
        for axis, lines in of_axes.items()
    }
    assert shown["optimizer.lr"] == [[(1e-3, 5.1), (3e-3, 5.0), (1e-2, 5.3)]]
    panel = {axes.get_xlabel(): axes for axes in sweep_plot(of_axes).axes}["optimizer.lr"]
    assert panel.get_xscale() == "log" and [text.get_text() for text in panel.texts] == ["5.000"]


def test_a_sweep_of_a_grid_has_a_line_for_each_setting_of_the_other_axes(tmp_path: Path) -> None:
    found = plan(tmp_path, "optimizer.lr=1e-3,3e-3", "optimizer.name=adamw,muon", grid=True, tokens=8192)
    losses = {run.name: 5.0 + i / 10 for i, run in enumerate(found.runs)}
    of_axes = sweeps(found, by_point(finished(found, losses)))
    assert set(of_axes) == {"optimizer.lr"}
    lines = {others: [(value, point.mean) for value, point in line] for others, line in of_axes["optimizer.lr"].items()}
    assert lines == {
        "optimizer.name = adamw": [(1e-3, losses["optimizer.lr=1e-3,optimizer.name=adamw,seed=0"]), (3e-3, 5.2)],
        "optimizer.name = muon": [(1e-3, 5.1), (3e-3, losses["optimizer.lr=3e-3,optimizer.name=muon,seed=0"])],
    }
