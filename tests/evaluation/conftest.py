"""A checkpoint of the debug model, trained for a few steps, which the tests in this folder share."""

from __future__ import annotations

import pytest
from evaluation_helpers import QUICK, titan_peer

from titan_peer.evaluation.load import load_language_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of the checkpoint."""
    folder = tmp_path_factory.mktemp("debug_model")
    titan_peer("train", *QUICK, "--training.steps", 4, "--job.dump_folder", folder)
    return folder / "checkpoint" / "step-4"


@pytest.fixture(scope="session")
def language_model(checkpoint):
    """The checkpoint, loaded for evaluation in float32 on the CPU."""
    model, _ = load_language_model(checkpoint, device="cpu", batch_size=8, max_new_tokens=8, precision="float32")
    return model
