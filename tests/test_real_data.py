"""Real images, where CLBENCH_DATA names a folder that has them: CIFAR-100 and PACS with an ImageNet-trained ViT-Tiny."""

import csv
import io

import pytest
from conftest import DATA

pytestmark = pytest.mark.data("cifar100.npz", "pacs.npz", "vit_tiny_patch16_224.safetensors")
SUBSET = ("scenario=cil_cifar100", "scenario.num_classes=6", "scenario.limit_train=8", "scenario.limit_test=5")
MODEL = ("model=vit_tiny", "learner.batch_size=16", "eval_batch_size=32")


@pytest.fixture(autouse=True)
def data(clbench):
    clbench.env["CLBENCH_DATA"] = DATA


def last_correct(record):
    return sum(record["correct"][-1]), sum(record["n"])


def test_ncm_does_not_depend_on_order_or_number_of_experiences(clbench):
    for order in ("natural", "icarl1993", "[5,0,3,1,4,2]"):
        for increment in (2, 3):
            clbench(
                "run",
                "feature_store=off",
                *SUBSET,
                *MODEL,
                "learner=ncm",
                f"scenario.order={order}",
                f"scenario.increment={increment}",
            )
    records = clbench.records()
    assert len(records) == 6 and len({last_correct(r) for r in records}) == 1
    correct, n = last_correct(records[0])
    assert n == 30 and correct / n > 0.6
    assert records[0]["passes"]["eval"] == 6 * 8 + 30, "an image passed twice through a frozen backbone"
    clbench("verify")


@pytest.mark.parametrize("learner", ["slca", "replay", "finetune"])
def test_training_learners_run(clbench, learner):
    clbench("run", *SUBSET, *MODEL, f"learner={learner}", "scenario.increment=3", "scenario.budget.epochs=1")
    (record,) = clbench.records()
    assert record["status"] == "ok" and record["model"]["file_sha256"]


def test_domain_incremental_pacs_runs(clbench):
    small = ("scenario.limit_train=4", "scenario.limit_test=3")
    clbench("run", "scenario=dil_pacs", *small, *MODEL, "learner=ncm")
    (record,) = clbench.records()
    assert len(record["n"]) == 4 and all(c is not None for row in record["correct"] for c in row)
    clbench("report", "--strict")
    (row,) = csv.DictReader(io.StringIO((clbench.folder / "results" / "leaderboard.csv").read_text()))
    assert float(row["last_macro_mean"]) > 1 / 7
