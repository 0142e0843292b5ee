"""Numbers of settings by hand, and the evaluator of activations against plain loops."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from clbench.evaluation import activations, metrics, setting_metrics
from clbench.interfaces import UserError


def entry(correct, n, first_seen, *operators, kind="class_incremental", **more):
    stream = {"kind": kind, "eval_names": [str(j) for j in range(len(n))], "operators": list(operators)}
    return {"correct": correct, "n": n, "first_seen": first_seen, "scenario": stream, **more}


def numbers(*given, **more):
    return setting_metrics.summary(entry(*given, **more))


def test_few_shot():
    found = numbers([[90, None, None], [80, 5, None], [72, 4, 2]], [100, 10, 10], [0, 1, 2], "shots")
    assert found == pytest.approx(
        {
            "performance_drop": 0.9 - 78 / 120,
            "base_accuracy": 0.72,
            "novel_accuracy": 0.3,
            "harmonic_mean": 2 * 0.72 * 0.3 / 1.02,
        }
    )
    never = numbers([[9, None], [9, 0]], [10, 10], [0, 1], "shots")
    assert never["harmonic_mean"] == 0.0 and never["novel_accuracy"] == 0.0
    assert set(numbers([[9]], [10], [0], "shots")) == {"performance_drop", "base_accuracy"}


def test_long_tails_give_every_class_equal_weight():
    classes = {"eval_classes": [[3, 1], [0]], "class_n": [[10, 2], [4]], "class_correct": [[[9, 1], None], [[5, 2], [1]]]}
    found = numbers([[10, None], [7, 1]], [12, 4], [0, 1], "long_tail", **classes)
    assert found == pytest.approx({"class_recall": (0.5 + 1.0 + 0.25) / 3, "worst_recall": 0.25})
    domains = {"eval_classes": [[0], [0]], "class_n": [[4], [4]], "class_correct": [[[4], [0]], [[1], [2]]]}
    assert numbers([[4, 0], [1, 2]], [4, 4], [0, 1], "long_tail", **domains)["class_recall"] == 3 / 8


def test_anytime():
    trace = [
        {"experience": 0, "step": 1, "correct": [5, None], "n": [10, None]},
        {"experience": 1, "step": 1, "correct": [4, 2], "n": [10, 10]},
        {"experience": 1, "step": 2, "correct": [2, 6], "n": [10, 10]},
    ]
    found = numbers([[8, None], [1, 9]], [10, 10], [0, 1], "looks", stability={"trace": trace})
    assert found == pytest.approx({"average_anytime": (0.5 + 0.8 + 0.3 + 0.4 + 0.5) / 5, "last_anytime": 0.4})


def test_domains():
    found = numbers([[8, 6, 1], [7, 9, 2], [5, 4, 10]], [10, 10, 10], [0, 1, 2], kind="domain_incremental")
    expected = {"in_domain": 0.9, "next_domain": 0.4, "forward_domain": 0.3, "backward_domain": 1.6 / 3}
    assert found == pytest.approx(expected)
    swapped = numbers([[6, 8, 1], [9, 7, 2], [4, 5, 10]], [10, 10, 10], [1, 0, 2], kind="domain_incremental")
    assert swapped == pytest.approx(expected)
    alone = numbers([[8, None], [7, 9]], [10, 10], [0, 1], kind="domain_incremental")
    assert set(alone) == {"in_domain", "backward_domain"}
    assert numbers([[8, 8]], [10, 10], [0, 0], kind="domain_incremental") == {}


def test_accumulation_counts_what_was_not_asked_as_wrong():
    rows = [[4, None], [None, None], [2, 6], [10, 10]]
    found = numbers(rows, [10, 10], [0, 2], "repeat")
    assert found["all_classes"] == 1.0 and found["knowledge_accumulation"] == pytest.approx(1 - 0.2)
    assert found["plasticity_loss"] == pytest.approx(0.4 - 0.6)
    long = [[i] for i in range(20)]
    assert numbers(long, [20], [0], "repeat")["knowledge_accumulation"] == pytest.approx((18.5 - 0.5) / 20)


def test_plasticity_and_error():
    falling = [[10 if j == i else 0 for j in range(3)] for i in range(3)]
    falling[1][1], falling[2][2] = 8, 4
    assert numbers(falling, [10] * 3, [0, 1, 2], "permute") == pytest.approx({"plasticity_loss": 0.6})
    assert numbers([[3]], [10], [0], "permute") == {}
    made = entry([[9, 6, 2, 7]], [10] * 4, [0] * 4, kind="test_time")
    made["scenario"]["eval_names"] = ["clean", "fog", "snow", "clean after"]
    assert setting_metrics.summary(made) == pytest.approx({"mean_error": 0.6, "clean_forgetting": 0.2})
    made["scenario"]["eval_names"] = ["a", "fog", "snow", "b"]
    assert setting_metrics.summary(made) == pytest.approx({"mean_error": 0.4})
    assert numbers([[9, 6]], [10] * 2, [0] * 2, "corrupt") == {}


def test_other_streams_have_none_of_them_and_explain_names_all():
    assert numbers([[9]], [10], [0]) == {} == setting_metrics.summary({"correct": None})
    assert {*setting_metrics.FORMULAS, *setting_metrics.PAIRED} == set(setting_metrics.ABOUT) <= set(metrics.ABOUT)
    named = {name for names in (*setting_metrics.SETTINGS.values(), *setting_metrics.KINDS.values()) for name in names}
    assert named == set(setting_metrics.FORMULAS)


def test_numbers_reach_terminal_table_and_page(clbench, small):
    ran = clbench("run", "learner=finetune", *small, "scenario.operators=[{looks: {number: 2}}]", "num_threads=1")
    assert "average_anytime" in ran.stdout
    report = clbench("report", "html").stdout + clbench("report").stdout
    assert "average_anytime" in report and "last_anytime" in report
    head, row = [line.split(",") for line in (clbench.folder / "results" / "leaderboard.csv").read_text().splitlines()[:2]]
    value = float(row[head.index("average_anytime_mean")])
    (record,) = clbench.records()
    assert value == pytest.approx(metrics.summary(record)["average_anytime"], abs=1e-6)
    page = (clbench.folder / "results" / "report.html").read_text()
    assert "average_anytime" in page and setting_metrics.ABOUT["average_anytime"].split(" of ")[0] in page
    assert "average_anytime" in clbench("report", "explain", "--part", "details").stdout


def test_a_stream_from_a_manifest_has_the_numbers_of_its_operators(clbench, small):
    operators = "scenario.operators=[{shots: {base: 2, way: 1, shot: 3}}]"
    clbench("manifest", "write", *small[:3], operators, "--out", "few.json")
    clbench("run", "learner=ncm", "num_threads=1", "scenario=manifest", "scenario.path=few.json", "scenario.dataset=digits")
    (record,) = clbench.records()
    assert record["scenario"]["operators"] == ["shots"] and "performance_drop" in metrics.summary(record)


def test_pairs_by_hand(clbench, small):
    noise = "scenario.operators=[{label_noise: {share: 0.4}}]"
    words = ("num_threads=1", *small)
    clbench("run", "-m", "learner=finetune,joint", "seed=0,1", *words)
    clbench("run", "learner=finetune", noise, *words)
    clbench("report")
    made = {(one["learner"]["name"], one["seed"], "operators" in one["config"]["scenario"]): one for one in clbench.records()}
    clean, noisy = made["finetune", 0, False], made["finetune", 0, True]
    own = {key: metrics.summary(one)["plasticity"] for key, one in made.items()}
    last = [metrics.summary(one)["last_macro"] for one in (clean, noisy)]
    with (clbench.folder / "results" / "leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    by = {(row["learner"], row["n_seeds"]): row for row in rows}
    lost = [own["joint", seed, False] - own["finetune", seed, False] for seed in (0, 1)]
    assert float(by["finetune", "2"]["intransigence_mean"]) == pytest.approx(sum(lost) / 2, abs=1e-4)
    assert float(by["finetune", "1"]["noise_robustness_mean"]) == pytest.approx(last[1] / last[0], abs=1e-4)
    assert by["joint", "2"]["intransigence_mean"] == "" == by["finetune", "2"]["noise_robustness_mean"]
    assert by["finetune", "1"]["intransigence_mean"] == ""  # no reference on the noisy stream
    alone = clbench("report", "--learner", "finetune", "--format", "csv").stdout
    assert "intransigence_mean" in alone and "noise_robustness" in clbench("report").stdout


class Batch:
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)


class Samples:
    """An evaluation set of ready images."""

    def __init__(self, x):
        self.x = x

    def batches(self, batch_size):
        return (Batch(self.x[i : i + batch_size]) for i in range(0, len(self.x), batch_size))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 9, 5), nn.ReLU())

    def features(self, x):
        return self.net(x)


class Holder:
    def __init__(self, model):
        self.model = model


def naive(model, x):
    """Shares of dormant and quiet units by loops over units."""
    conv = torch.relu(model.net[0](x))
    out = torch.relu(model.net[3](conv.flatten(1)))
    columns = [[conv[:, c].flatten() for c in range(3)], [out[:, u] for u in range(5)]]
    dormant = sum(float((h != 0).float().mean()) < 0.01 for layer in columns for h in layer)
    quiet = 0
    for layer in columns:
        sizes = [float(h.abs().mean()) for h in layer]
        quiet += sum(size / (sum(sizes) / len(sizes) + 1e-9) <= 0.025 for size in sizes)
    return dormant / 8, quiet / 8, out


def test_activations_against_loops():
    torch.manual_seed(0)
    model = Small()
    with torch.no_grad():
        model.net[0].bias[1] = -100.0  # a dead channel
        model.net[3].bias[:] = 1.0
        model.net[3].weight[2] = 0.0
        model.net[3].bias[2] = 1e-5  # a quiet unit that is not dead
    model.train()
    x = torch.randn(130, 1, 4, 4)
    found = activations.Activations()(Holder(model), Samples(x))
    with torch.no_grad():
        dormant, quiet, h = naive(model, x)
    assert model.training and found["n"] == 130
    shares = {name: value / 130 for name, value in found.items()}
    assert shares["dormant_share"] == pytest.approx(dormant) and dormant >= 1 / 8
    assert shares["quiet_share"] == pytest.approx(quiet) and quiet > dormant
    s = np.linalg.svd(h.double().numpy(), compute_uv=False)
    p = s[s > 1e-12] / s.sum()
    assert shares["effective_rank"] == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert shares["stable_rank"] == next(k for k in range(1, 6) if s[:k].sum() >= 0.99 * s.sum())


def test_ranks_by_hand():
    assert activations.effective_rank(torch.ones(4).double()) == pytest.approx(4.0)
    assert activations.effective_rank(torch.tensor([1.0, 0.0])) == 1.0
    assert activations.effective_rank(torch.zeros(3)) == 0.0 == activations.stable_rank(torch.zeros(3))
    assert activations.stable_rank(torch.tensor([98.0, 1.5, 0.5])) == 2.0


def test_a_learner_without_network_or_units_is_refused_in_one_line():
    with pytest.raises(UserError, match="needs a network"):
        activations.Activations()(object(), Samples(torch.zeros(2, 1, 4, 4)))
    model = Small()
    model.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(UserError, match="no activation module"):
        activations.Activations()(Holder(model), Samples(torch.zeros(2, 1, 4, 4)))


def test_activations_from_the_command_line(clbench, small):
    names = "scenario.operators=[{evaluators: {names: [activations]}}]"
    clbench("run", "learner=finetune", "model=resnet32", *small, names, "num_threads=1")
    (record,) = clbench.records()
    assert "evaluators" not in record
    row = next(row for row in record["rows"] if row["evaluator"] == "activations" and row["experience"] == 1)
    assert all(0 < rank / n <= n for rank, n in zip(row["sums"]["effective_rank"], row["sums"]["n"], strict=True))
    assert "activations/effective_rank_mean" in json.dumps(
        clbench("report").stdout + (clbench.folder / "results" / "leaderboard.csv").read_text()
    )
    refused = clbench("run", *small, "scenario.operators=[{evaluators: {names: [activation]}}]", code=2)
    assert "did you mean 'activations'?" in refused.stderr
