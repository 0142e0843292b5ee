"""`clbench bench`: what is needed, by hand; what is shown and judged; the command itself at sizes that mean nothing."""

import argparse
import json
import math

import numpy as np
import pytest
import torch

from clbench.bench import machine, needed, options, presets, rates, scaling, stand_ins, startup, table
from clbench.interfaces import UserError

TWENTY = {"train": [250] * 4, "test": [125] * 4}
FIFTY = {"train": [100] * 10, "test": [50] * 10}
ADAPTER = {"pet": {"_target_": "clbench.models.pet_modules.adapter"}}
BARE = {"pet": {"_target_": "clbench.models.pet_modules.none"}}


@pytest.mark.parametrize(
    ("learner", "stream", "epochs", "extra", "trained", "forward"),
    [
        ("ncm", TWENTY, 1, {}, 0, 1500),
        ("slca", TWENTY, 4, {}, 4000, 1000 + 125 + 250 + 375 + 500),
        ("ranpac", TWENTY, 4, ADAPTER, 1000, 1500),
        ("ranpac", TWENTY, 4, BARE, 0, 1500),
        ("aper", TWENTY, 4, ADAPTER, 1000, 3000),
        ("ease", TWENTY, 2, ADAPTER, 2000, 250 + 500 + 750 + 1000 + 4 * 500),
        ("mos", TWENTY, 4, ADAPTER, 4000, 1000 + 750 + 500 + 375),
        ("mos", FIFTY, 2, ADAPTER, 2000, 1000 + 900 + 500 + 450),
        # 240 of 250 images an epoch; 5 epochs, and 3 of 5 where the module stands still for 0.4 of the training
        ("lae", TWENTY, 5, {"batch_size": 24, "freeze": 0.4} | ADAPTER, 1200 + 3 * 720, 3 * 480 + 125 + 2 * (250 + 375 + 500)),
        # half of 5 x 240 is 600: 25 whole batches
        ("lae", TWENTY, 5, {"batch_size": 24, "freeze": 0.5} | ADAPTER, 1200 + 3 * 600, 3 * 600 + 125 + 2 * (250 + 375 + 500)),
    ],
)
def test_needed_passes_by_hand(learner, stream, epochs, extra, trained, forward):
    made = needed.KNOWN[learner](needed.Stream(stream["train"], stream["test"], epochs, extra))
    assert (made.full + made.adapter, made.forward) == (trained, forward)
    assert bool(made.full) == (learner == "slca")


def test_needed_passes_of_low_rank_modules():
    """Four epochs of four times 250 images, and each image twice more where inputs are looked at; the network changes."""
    tested = 125 + 250 + 375 + 500
    for learner, extra in (("inflora", 2000), ("sd_lora", 0), ("finetune", 0)):
        made = needed.KNOWN[learner](needed.Stream(TWENTY["train"], TWENTY["test"], 4, ADAPTER))
        assert made == needed.Passes(adapter=4000, forward=extra + tested), learner
    assert needed.KNOWN["finetune"](needed.Stream([10], [5], 2, {})) == needed.Passes(full=20, forward=5)


@pytest.mark.parametrize("learner", ["inflora", "sd_lora", "finetune"])
def test_learners_with_low_rank_modules_pass_what_they_need(learner, tmp_path):
    from clbench.config.compose import compose
    from clbench.records import record
    from clbench.run import runner

    words = (f"learner={learner}", *(("pet=lora",) if learner == "finetune" else ()), "scenario.num_classes=4")
    sizes = (
        "scenario.limit_train=6",
        "scenario.limit_test=4",
        "scenario.budget.epochs=2",
        "feature_store=off",
        "num_threads=1",
    )
    (job,) = compose([*words, *sizes, f"results_dir={tmp_path}", "on_error=raise"])
    entry = record.read(runner.run_job(job).path)
    least = needed.KNOWN[learner](needed.Stream([12, 12], [8, 8], 2, job["learner"]))
    assert (entry["passes"]["train"], entry["passes"]["eval"]) == (least.adapter, least.forward) and least.full == 0


def test_a_floor_is_passes_at_rates():
    passes = needed.Passes(full=100, adapter=0, forward=30)
    assert passes.seconds({"full": 50.0, "forward": 10.0}) == 5.0


def test_a_rate_is_that_of_its_fastest_block(monkeypatch):
    """Of a call that takes 0.3, 0.5, then 0.1, 0.4, 0.4 | 0.2, 0.2, 0.2 s, blocks of 1.2 s hold three: the second is faster."""
    moments, now = iter([0.3, 0.5, 0.1, 0.4, 0.4, 0.2, 0.2, 0.2]), [0.0]

    def work():
        now[0] += next(moments)

    monkeypatch.setattr(rates.time, "perf_counter", lambda: now[0])
    assert rates.least(work, torch.device("cpu"), 2, block=1.2) == pytest.approx(0.2)
    assert next(moments, None) is None


def test_rates_count_operations_and_train_what_they_say():
    from clbench.config.compose import build, compose

    node = compose(["model=nano"])[0]["model"]
    found = rates.images(
        node, torch.device("cpu"), "fp32", "highest+explicit", batches=dict.fromkeys(rates.KINDS, (2,)), times=1
    )
    assert all(found[kind]["2"] > 0 for kind in rates.KINDS)
    flop = found["flop"]
    d, n, layers = 160, 17, 4
    dense = layers * (12 * d * d * n + 2 * n * n * d) + 3 * 64 * d * (n - 1)
    assert flop["forward"] == pytest.approx(2 * dense, rel=0.02)
    assert 2.8 < flop["full"] / flop["forward"] < 3.1 and 1.6 < flop["adapter"] / flop["forward"] < 2.6
    model = build(node)
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    rates.work_of("adapter", model.net, model.num_features, torch.device("cpu"), "fp32")(torch.randn(2, 3, 32, 32))
    after = model.net.state_dict()
    moved = {name for name in after if name not in before or not torch.equal(after[name], before[name])}
    assert moved and all(".mlp." in name and (".down." in name or ".up." in name or ".mlp.mlp." in name) for name in moved)
    kept = [name for name in after if ".mlp.mlp." in name]
    assert all(torch.equal(after[name], before[name.replace(".mlp.mlp.", ".mlp.")]) for name in kept)


def test_slope_by_hand():
    assert scaling.slope([1, 10, 100], [3, 30, 300]) == pytest.approx(1.0)
    assert scaling.slope([2, 4, 8], [5, 20, 80]) == pytest.approx(2.0)
    assert scaling.slope([5], [1]) is None and scaling.slope([1, 2], [0, 1]) is None


def row(case, precision, **more):
    base = {"seconds": 10.0, "peak_bytes": 90, "accuracy": 0.5, "n": 100, "share": 0.85}
    old = {"seconds": 60.0, "peak_bytes": 100, "passes": {"eval": 7}, "phases": {}}
    return {"case": case, "precision": precision, "naive": old, "ratio": 6.0, **base, **more}


def test_targets_by_hand():
    preset = presets.PRESETS["cpu_targets"]
    rows = [row("simplecil", "fp32"), row("simplecil", "bf16", share=0.79, ratio=4.9, peak_bytes=101, accuracy=0.44)]
    found = {"cases": rows, "rates": {}, "sweep": {"ratio": 10.0}}
    met = {t["what"]: t["met"] for t in table.targets_of(preset, found)}
    assert met == {
        "simplecil, fp32: share of the floor": True,
        "simplecil, fp32: memory, at most naive": True,
        "simplecil, bf16: share of the floor": False,
        "simplecil, bf16: times faster than naive": False,
        "simplecil, bf16: memory, at most naive": False,
        "simplecil: bf16 moves accuracy less than its error": False,  # 0.06 against sqrt(0.5 * 0.5 / 100) = 0.05
        "sweep: times faster than naive": True,
    }
    gpu = presets.PRESETS["vit_base_h200"]
    measured = {"path": {"forward": {"128": 9e3, "256": 1.2e4}, "full": {"128": 3.7e3}}}
    found = {"cases": [row("mos B0 Inc5", "bf16", seconds=361.0)], "rates": {"vit_base": {"bf16": measured}}}
    met = {t["what"]: t["met"] for t in table.targets_of(gpu, found)}
    assert met == {"mos B0 Inc5, bf16: seconds": False, "vit_base: forward, images/s": True, "vit_base: full, images/s": False}


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_compose(name, tmp_path):
    from clbench.config import registry
    from clbench.config.compose import compose

    preset = presets.PRESETS[name]
    for case in (*preset.cases, *preset.sweep):
        registry.check(compose([*preset.overrides, *case.overrides])[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("scalng",), "did you mean 'scaling'"),
        (("--preset", "cpu_target"), "did you mean 'cpu_targets'"),
        (("--precision", "fp16"), "--precision must be"),
        (("startup", "seed=1"), "seed=1 has no effect"),
        (("startup", "--learners", "ncm"), "--learners has no effect on bench startup"),
        (("scaling", "--preset", "quick"), "--preset has no effect"),
        (("scaling", "--experiences", "5,x"), "--experiences takes whole numbers"),
        (("scaling", "--classes", "0"), "from 1"),
        (("--learners", ","), "--learners needs"),
        (("--cases", "slcaa"), "no case 'slcaa'; did you mean 'slca'"),
        (("--cases", "sweep"), "no case 'sweep'"),
        (("--preset", "cpu_targets", "--cases", "ncm"), "one of: simplecil"),
        (("--cases", "slca", "--learners", "slca"), "give one of them"),
        (("scaling", "--cases", "slca"), "--cases has no effect on bench scaling"),
        (("--name", "../x"), "--name must be"),
        (("--learners", "ewc", "--quick"), "ewc has no naive version"),
        (("--learners", "ncmm"), "no learner 'ncmm'"),
        (("cases", "scaling"), "write NAME=VALUE"),
    ],
)
def test_mistakes_are_one_line(clbench, words, message):
    done = clbench("bench", *words, code=2)
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not list(clbench.folder.glob("results/bench/*.json"))


def test_the_best_path_of_each_kind():
    """By hand: what the floor's rates are measured with again."""
    slow = {"forward": {"16": 9.0, "32": 11.0}, "adapter": {"32": 5.0}, "full": {"32": 3.0}, "flop": {"forward": 1.0}}
    fast = {"forward": {"16": 10.0}, "adapter": {"32": 6.0}, "full": {"32": 2.0}}
    assert rates.fastest({"a": slow, "b": fast}) == {"a": ["forward", "full"], "b": ["adapter"]}
    assert rates.fastest({"a": slow, "b": fast}, ["forward"]) == {"a": ["forward"]}
    assert rates.fastest({"a": {"forward": {"4": 1.0}}}) == {"a": ["forward"]}, "a network without blocks trains no adapter"
    assert rates.best({"a": slow, "b": fast}) == {"forward": 11.0, "adapter": 6.0, "full": 3.0}


def test_some_cases_of_a_preset():
    from clbench.bench import options

    def of(*words):
        parser = argparse.ArgumentParser()
        options.add_arguments(parser)
        return options.chosen(parser.parse_args(["--preset", "cpu_targets", *words]), [])

    name, preset = of("--cases", "mos 10 x 5,slca")
    assert name == "cpu_targets_part" and [c.name for c in preset.cases] == ["slca", "mos 10 x 5"] and preset.sweep == ()
    name, preset = of("--cases", "sweep", "--no-naive", "--name", "mine")
    assert name == "mine" and preset.cases == () and [c.naive for c in preset.sweep] == [False] * 3
    assert of()[0] == "cpu_targets" and all(c.naive for c in of()[1].sweep)


def test_the_command_measures_and_writes(clbench):
    words = ("scenario.num_classes=4", "learner.lr=0.01", "num_threads=1")
    out = clbench("bench", "--quick", "--learners", "slca", "--precision", "fp32,bf16", "--name", "here", *words).stdout
    found = json.loads((clbench.folder / "results" / "bench" / "here.json").read_text())
    assert found["complete"] and found["kind"] == "cases" and found["quick"]
    a, b = found["cases"]
    assert (a["precision"], b["precision"]) == ("fp32", "bf16") and a["naive"] == b["naive"]
    assert a["scenario"] == {"name": "cil_digits", "train": [12, 12], "test": [8, 8]}
    assert a["passes"]["train"] == a["needed"]["full"] == 2 * 24 and a["passes"]["eval"] == a["needed"]["forward"] == 24 + 24
    assert set(a["rates"]) == {"forward", "full"}, "the rates that SLCA's floor is made of, measured around its run"
    floor = 48 / a["rates"]["full"] + 48 / a["rates"]["forward"]
    assert a["floor"] == pytest.approx(floor, rel=1e-4) and a["share"] == pytest.approx(a["floor"] / a["seconds"], rel=1e-4)
    assert a["ratio"] == pytest.approx(a["naive"]["seconds"] / a["seconds"], rel=1e-4)
    assert {"learn", "evaluate", "fit:train", "extract"} <= set(a["phases"]) and a["naive"]["passes"]["eval"] > 48
    assert found["bf16_against_fp32"][0]["error"] == pytest.approx(
        math.sqrt(a["accuracy"] * (1 - a["accuracy"]) / 16), rel=1e-4
    )
    assert {"cpu", "cores", "versions", "load"} <= set(found["machine"])
    import platform

    assert platform.node() not in json.dumps(found["machine"]), "the host's name is nobody's business"
    for text in ("slca", "ratio", "of peak", "seconds by phase", "standard error", "GFLOP/s"):
        assert text in out, text


def test_a_sweep_and_stand_ins(tmp_path, monkeypatch):
    from clbench.bench import measure

    monkeypatch.delenv("CLBENCH_DATA", raising=False)
    words = ("scenario=cil_cifar10", "scenario.num_classes=4", "model=nano", "device=cpu", "num_threads=1", *options.QUICK)
    cases = tuple(presets.Case(n, (f"learner={n}", *options.QUICK, "scenario.order=random")) for n in ("ncm", "fecam"))
    preset = presets.Preset("", words, cases[:1], sweep=cases, seeds=2)
    monkeypatch.setattr(stand_ins, "CIFAR_LIKE", {"cil_cifar10": (10, 12, 8, 2)})
    saved = []
    with stand_ins.of(preset, True) as ready:
        found = measure.measure("x", ready, True, lambda part: saved.append(len(part["cases"])))
    assert saved and found["sweep"]["seeds"] == 2
    runs = found["sweep"]["runs"]
    assert [(r["learner"], r["seed"]) for r in runs] == [("ncm", 0), ("ncm", 1), ("fecam", 0), ("fecam", 1)]
    assert runs[0]["eval"] == 24 + 16 and all(r["eval"] == 0 for r in runs[1:]), "ten seeds cost one extraction"
    assert found["sweep"]["ratio"] > 0 and found["cases"][0]["accuracy"] > 0.5


def test_weights_can_stand_in(tmp_path):
    from clbench.config.compose import build, compose
    from clbench.models.weights import state_sha256

    node = compose(["model=nano_random"])[0]["model"]
    path = stand_ins.weights(node, tmp_path / "w.safetensors")
    filled = build({**node, "weights": str(path)})
    assert filled.pretrained and state_sha256(filled.net.state_dict()) == state_sha256(build(node).net.state_dict())


def test_scaling_at_a_tiny_size(clbench):
    out = clbench(
        "bench", "scaling", "--learners", "ncm", "--experiences", "1,2", "--classes", "2,4", "--quick", "num_threads=1"
    )
    found = json.loads((clbench.folder / "results" / "bench" / "scaling.json").read_text())
    by = {(r["against"], r["size"]): r for r in found["rows"]}
    assert set(by) == {("experiences", 1), ("experiences", 2), ("classes", 2), ("classes", 4)}
    assert by["experiences", 1]["experiences"] == 1 and by["experiences", 2]["experiences"] == 2
    assert by["experiences", 1]["passes"] == by["experiences", 2]["passes"] == 8 * 9, "the work must be the same"
    assert by["classes", 2]["passes"] == by["classes", 4]["passes"]
    each = next(e for e in found["exponents"] if e["against"] == "classes")
    assert each["stored_bytes_each"] == (160 + 1) * 8, "a mean and a count in float64"
    assert "exponent, experiences" in out.stdout and "exponent, classes" in out.stdout


def test_startup_records_are_records(tmp_path):
    from clbench.records import record
    from clbench.records.verify import verify

    startup.synthetic(tmp_path, 30)
    entries, problems = record.read_all(tmp_path / "records")
    assert len(entries) == 30 and not problems
    assert len({(e["learner"]["name"], e["seed"]) for e in entries}) == 30
    assert verify is not None


def test_memory_is_counted_anew():
    with machine.Peak(torch.device("cpu")) as big:
        x = torch.ones(64 << 20)
    del x
    with machine.Peak(torch.device("cpu")) as small:
        pass
    if big.bytes is None or small.bytes is None:
        pytest.skip("this system does not start the count anew")
    assert big.bytes - small.bytes > 150e6


def test_online_loops_do_the_same_work():
    """The same images from the same weights: both networks end near each other, and each image is trained on once."""
    import copy

    from clbench.bench import online
    from clbench.config.compose import build, compose

    model = build(compose(["model=convnet", "model.kwargs.maps=[4]", "model.kwargs.hidden=8", "model.norm=none"])[0]["model"])
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (60, 32, 32, 3), np.uint8), rng.integers(0, 10, 60)
    ours = online.OfClbench(copy.deepcopy(model), x, y, "fp32", 10)
    theirs = online.ByHand(copy.deepcopy(model), x, y, "fp32", 10)
    ours(1)
    theirs.head.load_state_dict({k.removeprefix("blocks.0."): v for k, v in ours.learner.head.state_dict().items()})
    theirs.net.load_state_dict(ours.model.net.state_dict())
    theirs.at = 10
    ours(5), theirs(5)
    assert ours.runtime.meter.visits == {"new": 60, "replayed": 0} and ours.at == theirs.at == 60
    for name, value in ours.model.net.state_dict().items():
        torch.testing.assert_close(value, theirs.net.state_dict()[name], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(ours.learner.head.blocks[0].weight, theirs.head.weight, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_adapting_loops_do_the_same_work(norm):
    """The same images from the same weights: the same answers, and scales and shifts that end near each other."""
    import copy

    from clbench.bench import adapting, online
    from clbench.config.compose import build, compose

    words = ["model=convnet", "model.kwargs.maps=[4]", "model.kwargs.hidden=8", f"model.norm={norm}"]
    model = build(compose(words)[0]["model"])
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (50, 32, 32, 3), np.uint8), rng.integers(0, 10, 50)
    loops = {name: kind(copy.deepcopy(model), x, y, "fp32", 10) for name, kind in online.loops_of("adapting").items()}
    ours, theirs = loops["clbench"], loops["by hand"]
    assert online.loops_of("online") is online.LOOPS and isinstance(ours, adapting.OfClbench)
    head = {k.removeprefix("blocks.0."): v for k, v in ours.learner.head.state_dict().items()}
    theirs.head.load_state_dict(head)
    ours(5), theirs(5)
    assert ours.answers == theirs.answers and len(ours.answers) == ours.at == theirs.at == 50
    moved = {f"net.{name}": p for name, p in theirs.net.named_parameters() if p.requires_grad}
    assert moved.keys() == ours.learner.adapted.weights.keys() and len(moved) >= 2
    for name, value in ours.learner.adapted.weights.items():
        assert not torch.equal(value, dict(model.named_parameters())[name])
        torch.testing.assert_close(value, moved[name], atol=2e-4, rtol=1e-3)


def test_online_writes_a_table_with_the_machine_in_it(tmp_path, monkeypatch):
    import csv

    from clbench.bench import command, online

    monkeypatch.setattr(
        online,
        "_rows",
        lambda node, flags, precision, batch, times, kinds: [
            {
                "precision": precision,
                "layout": "x",
                "loop": "clbench",
                "images_per_second": 1.0,
                "ratio": 1.0,
                "ratio_cpu": 1.25,
            }
        ],
    )
    left = ("preset", "cases", "learners", "scenario", "model", "experiences", "classes", "records", "name", "batch")
    args = argparse.Namespace(overrides=["online"], precision="fp32", quick=True, results_dir=str(tmp_path), no_naive=False)
    vars(args).update(dict.fromkeys(left), stand_ins=False)
    shown, code = command.run(args)
    assert code == 0 and "at most 1.10 of a loop by hand: 1.25, NO" in shown
    with open(tmp_path / "bench" / "online.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and set(rows[0]) == set(online.COLUMNS) and rows[0]["cpu"] and rows[0]["model"] == "resnet18_slim"
    assert json.loads((tmp_path / "bench" / "online.json").read_text())["rows"][0]["precision"] == "fp32"
    args.batch, args.name = 128, "wide"
    assert "batches of 128," in command.run(args)[0]
    assert next(csv.DictReader((tmp_path / "bench" / "wide.csv").read_text().splitlines()))["batch"] == "128"
    args.batch = 0
    with pytest.raises(UserError, match="--batch must be at least 1, got 0"):
        online.measure(args)
    args.batch, args.precision = None, "fp16"
    with pytest.raises(UserError, match=r"--precision must be fp32, bf16 or fp32,bf16, got 'fp16'"):
        online.measure(args)
    args.overrides = ["online", "learner=ncm"]
    with pytest.raises(UserError, match="learner=ncm has no effect on bench online"):
        command.run(args)
