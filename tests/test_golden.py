"""Numbers that may not move: one matrix per learner on a small stream, equal to the last count with one thread.

`pytest tests/test_golden.py --update-golden` writes them anew; the difference is shown in review, and the change is one where
numbers move. The counts depend on the processor's arithmetic, so they are compared on the kind that made them and, elsewhere,
to within two images.
"""

import json
import pathlib
import platform

import numpy as np
import pytest

from clbench.config.registry import asks, choices

GOLDEN = pathlib.Path(__file__).parent / "golden" / "matrices.json"
STREAM = ("scenario.num_classes=6", "scenario.limit_train=60", "scenario.limit_test=30", "scenario.budget.epochs=3")
PINNED = "arithmetic=medium+explicit"  # what made them; elsewhere `medium` may round more, within the two images
LEARNERS = [name for name in choices("learner") if asks("learner", name) == "predict"]


def flags():
    import torch

    return f"{platform.machine()} torch {torch.__version__.split('.')[0]}"


@pytest.mark.parametrize("learner", LEARNERS)
def test_matrix(clbench, learner, request):
    clbench("run", f"learner={learner}", *STREAM, "num_threads=1", "device=cpu", PINNED)
    (record,) = clbench.records()
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if request.config.getoption("--update-golden"):
        golden[learner] = {"made_on": flags(), "correct": record["correct"], "n": record["n"]}
        golden["manifest"] = record["scenario"]["manifest_sha256"]
        GOLDEN.parent.mkdir(exist_ok=True)
        lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(golden.items()))
        GOLDEN.write_text("{\n" + lines + "\n}\n")
        return
    assert record["scenario"]["manifest_sha256"] == golden["manifest"]
    old = golden[learner]
    a, b = (np.array([[-9 if c is None else c for c in row] for row in m]) for m in (record["correct"], old["correct"]))
    assert record["n"] == old["n"] and ((a < 0) == (b < 0)).all()
    assert np.abs(a - b).max() <= 2, f"numbers moved:\n{a}\n{b}"
