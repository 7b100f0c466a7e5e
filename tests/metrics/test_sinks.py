"""Every sink stores its reports, and a resumed run continues at the step of its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_files import wandb_history, wandb_records

from titan_peer.metrics.sinks import Histogram, JsonlSink, TensorBoardSink, WandbSink

HISTOGRAM = Histogram([0.0, 1.0, 2.0, 4.0], [3, 0, 2])


@pytest.fixture
def png(tmp_path: Path) -> Path:
    from matplotlib.image import imsave

    path = tmp_path / "plot.png"
    imsave(path, np.random.default_rng(0).random((8, 9, 3)))
    return path


def test_json_lines_of_a_resumed_run_have_every_step_once(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    first = JsonlSink(file, resumed_step=0)
    for step in range(1, 6):
        first.write({"step": step, "loss": 1.0 / step})
    first.histogram(5, "load", HISTOGRAM)
    first.close()
    with file.open("a", encoding="utf-8") as cut_off:
        cut_off.write('{"step": 6, "lo')
    second = JsonlSink(file, resumed_step=3)
    second.write({"step": 4, "loss": 0.5})
    second.histogram(4, "load", HISTOGRAM)
    second.alert(4, "loss is not finite", "step 4")
    second.close()
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(line["step"], line.get("loss")) for line in lines[:4]] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.5)]
    assert lines[4] == {"step": 4, "histogram": "load", "edges": [0.0, 1.0, 2.0, 4.0], "counts": [3, 0, 2]}
    assert lines[5]["alert"] == "loss is not finite" and len(lines) == 6
    JsonlSink(file, resumed_step=0).close()
    assert file.read_text(encoding="utf-8") == ""  # a new run


def test_tensorboard_hides_what_a_resumed_run_does_again(tmp_path: Path, png: Path) -> None:
    first = TensorBoardSink(tmp_path / "board", "steps = 9", resumed_step=0)
    for step in range(1, 6):
        first.write({"step": step, "loss": 1.0})
    first.close()
    second = TensorBoardSink(tmp_path / "board", "steps = 9", resumed_step=3)
    second.write({"step": 4, "loss": 2.0})
    second.histogram(4, "load", HISTOGRAM)
    second.image(4, "plot", png)
    second.alert(4, "title", "text")
    second.close()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]
    (event,) = board.Histograms("load")
    value = event.histogram_value
    assert (value.num, value.sum, value.bucket_limit, value.bucket) == (5.0, 7.5, [1.0, 2.0, 4.0], [3.0, 0.0, 2.0])
    assert (board.Images("plot")[0].height, board.Images("plot")[0].width) == (8, 9)
    assert "steps = 9" in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "**title**" in board.Tensors("alert/text_summary")[0].tensor_proto.string_val[0].decode()


def test_wandb_offline_goes_on_with_the_same_run(tmp_path: Path, png: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    checkpoint = tmp_path / "job" / "checkpoint" / "step-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}", encoding="utf-8")

    def sink(resumed_step: int, checkpoints: str) -> WandbSink:
        return WandbSink(
            tmp_path / "job",
            {"training": {"steps": 9}},
            resumed_step=resumed_step,
            mode="offline",
            group="heads",
            checkpoints=checkpoints,  # type: ignore[arg-type]
        )

    first = sink(0, "reference")
    first.write({"step": 3, "loss": 1.0})
    first.checkpoint(3, checkpoint)
    first.write({"step": 5, "loss": 1.5})
    first.close()
    second = sink(3, "upload")
    second.write({"step": 4, "loss": 2.0})
    second.histogram(4, "load", HISTOGRAM)
    second.image(4, "plot", png)
    second.alert(4, "loss is not finite", "try a lower rate")
    second.checkpoint(3, checkpoint)
    second.close()
    third = sink(0, "none")  # started anew: a different run
    third.checkpoint(3, checkpoint)
    third.close()

    files = {
        path: wandb_records(path, "run")[0] for path in (tmp_path / "job" / "wandb").glob("offline-run-*/run-*.wandb")
    }
    assert len(files) == 3
    by_first_step = {}
    for path, run in files.items():
        history = wandb_history(path)
        by_first_step[history[0]["step"] if history else None] = (path, run, history)
    before, after, anew = by_first_step[3], by_first_step[4], by_first_step[None]
    assert before[1].run_id == after[1].run_id != anew[1].run_id
    assert {run.run_group for run in files.values()} == {"heads"}
    assert json.loads({item.key: item.value_json for item in before[1].config.update}["training"]) == {"steps": 9}
    assert [row["loss"] for row in before[2]] == [1.0, 1.5]
    merged = {key: value for row in after[2] for key, value in row.items()}
    assert merged["loss"] == 2.0 and merged["load"]["values"] == [3, 0, 2] and merged["plot"]["_type"] == "image-file"
    (reference,), (upload,) = (wandb_records(found[0], "artifact") for found in (before, after))
    assert [entry.ref for entry in reference.manifest.contents] == [(checkpoint.absolute() / "manifest.json").as_uri()]
    assert [entry.path for entry in upload.manifest.contents] == ["manifest.json"]
    assert "step-3" in upload.aliases
    (alert,) = wandb_records(after[0], "alert")
    assert alert.title == "loss is not finite" and "step 4: try a lower rate" in alert.text
    assert not wandb_records(anew[0], "artifact")
