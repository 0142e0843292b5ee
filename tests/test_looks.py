"""Looks inside experiences: their rows and numbers, that training does not depend on them, resume, refusals."""

import csv
import json
import time

import pytest
import torch

from clbench.config.compose import compose, load_target
from clbench.config.registry import choices
from clbench.evaluation import metrics
from clbench.interfaces import Capabilities, UserError, declared
from clbench.learners.finetune import Finetune
from clbench.records import record
from clbench.run.image_stream import ImageLooks, ImageStream
from clbench.run.runner import run_job
from clbench.streams.generators import class_incremental
from clbench.testing.anytime import check_anytime
from clbench.testing.contract import Trial, small_stream
from clbench.training import looks
from clbench.training.fit import Recipe, fit

SMALL = ("scenario.num_classes=6", "scenario.limit_train=8", "scenario.limit_test=6", "scenario.budget.epochs=2")
TINY = ("scenario.num_classes=4", "scenario.limit_train=6", "scenario.limit_test=3", "scenario.budget.epochs=1")
EXACT = ("num_threads=1", "arithmetic=reference")
LOOKS = "scenario.operators=[{looks: {number: 3}}]"
ANYTIME = {"derpp", "ewc", "feat_kd", "finetune", "joint", "l2_reg", "lwf", "pred_kd", "replay"}
ANYTIME |= {"cbp", "ewc_online", "l2_init", "mas", "rwalk", "shrink_perturb", "si"}
ANYTIME |= {"focal_kd", "simplex"}
ANYTIME |= {"rehearsal_free"}
ANYTIME |= {"hdc"}
ANYTIME |= {"fast_slow"}
ANYTIME |= {"air", "laftr", "qda", "sfr"}
ANYTIME |= {"acil", "agem", "er", "er_ace", "figmn", "gem", "klda", "mir", "scr", "slda"}
ANYTIME |= {"losse_ftl"}
ANYTIME |= {"naive_bayes"}
ANYTIME |= {"online_ensemble"}
ANYTIME |= {"cls_er"}
ANYTIME |= {"homeostatic"}
DISCLOSED = {"dst", "rank_updates", "tag"}  # those that need the task
ANYTIME |= DISCLOSED
ANYTIME |= {"onpro"}


def stored(folder):
    (path,) = (folder / "records").glob("*.json")
    return json.loads(path.read_text())


def run(folder, *words):
    """A finished run of the small stream in this process, as its record lies on disk."""
    options = [*TINY, *EXACT, f"results_dir={folder}", "on_error=raise", *words]
    assert run_job(compose(options)[0]).status == "ok"
    return stored(folder)


def naive(rows, first):
    """The four numbers of continual evaluation, from raw rows, in loops."""
    total = len(first)
    ends = {r["experience"]: r["sums"]["correct"] for r in rows if r["step"] is None}
    inside = [r for r in rows if r["step"] is not None]
    sizes = next(r["sums"]["n"] for r in reversed(inside))
    micro = []
    for row in inside:
        pairs = [
            (c, n) for c, n, f in zip(row["sums"]["correct"], row["sums"]["n"], first, strict=True) if f <= row["experience"]
        ]
        micro.append(sum(c for c, _ in pairs) / sum(n for _, n in pairs))
    gaps, lowest = [], []
    for j in range(total - 1):
        later = []
        for i in range(first[j] + 1, total):
            during = [r["sums"]["correct"][j] / sizes[j] for r in inside if r["experience"] == i]
            gaps.append(ends[i - 1][j] / sizes[j] - min(during))
            later += [*during, ends[i][j] / sizes[j]]
        lowest.append(min(later))
    least = sum(lowest) / len(lowest)
    return {
        "a_auc": sum(micro) / len(micro),
        "stability_gap": sum(gaps) / len(gaps),
        "min_acc": least,
        "wc_acc": ends[total - 1][total - 1] / sizes[-1] / total + (1 - 1 / total) * least,
    }


@pytest.mark.parametrize("option", ["number: 3", "every: 10"])
def test_rows_and_numbers_of_the_command_line(clbench, option):
    rates = ("learner=finetune", "learner.batch_size=4", "learner.backbone_lr=0.005")
    clbench("run", *rates, *SMALL, *EXACT, f"scenario.operators=[{{looks: {{{option}}}}}]")
    entry = stored(clbench.folder / "results")
    inside = [(r["experience"], r["trained"], r["step"]) for r in entry["rows"] if r["step"] is not None]
    # 16 samples, twice; batches of 4: the look comes after the first step that reaches the place
    places = {"number: 3": [8, 16, 24], "every: 10": [12, 20, 32]}[option]
    assert inside == [(i, place, place // 4) for i in range(3) for place in places]
    order = [(r["experience"], r["step"] is None) for r in entry["rows"]]
    assert order == sorted(order)
    assert entry["rows"][0]["sums"]["n"] == [12, None, None] and entry["rows"][0]["sums"]["correct"][1:] == [None, None]
    said = naive(entry["rows"], [0, 1, 2])
    assert said["stability_gap"] > 0 and 0 < said["min_acc"] < 1, "the rates forget nothing: the formulas are not tried"
    found = metrics.summary(record.read(clbench.folder / "results" / "records" / f"{entry['run_id']}.json"))
    assert {name: found[name] for name in said} == pytest.approx(said, abs=1e-12)
    clbench("report")
    with (clbench.folder / "results" / "leaderboard.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert {name: float(row[f"{name}_mean"]) for name in said} == pytest.approx(said, abs=5e-5)
    assert "1 verified" in clbench("verify").stdout
    if option == "number: 3":
        assert "verified" in clbench("verify", "--rerun", "1").stdout
        path = clbench.folder / "results" / "records" / f"{entry['run_id']}.json"
        inner = next(r for r in entry["rows"] if r["step"] is not None and r["experience"] == 1)
        inner["sums"]["correct"][0] += 1 if inner["sums"]["correct"][0] < 12 else -1
        path.write_text(json.dumps({**entry, "checksum": record.checksum(entry)}))
        out = clbench("verify", "--rerun", "1", code=1).stdout
        assert "accuracy[1] step 2.correct[0]" in out, "a look that was made up is not noticed"


def test_who_declares_anytime():
    found = set()
    for name in choices("learner"):
        node = compose([f"learner={name}"])[0]["learner"] if name in ANYTIME else None
        if node is None:
            (path,) = choices("learner")[name]
            target = next(line.split()[1] for line in path.read_text().splitlines() if line.startswith("_target_:"))
            node = {"_target_": target}
        can = getattr(load_target(node["_target_"]), "capabilities", None)
        found |= {name} if isinstance(can, Capabilities) and declared(load_target(node["_target_"]), node).anytime else set()
    assert found == ANYTIME


@pytest.mark.parametrize("words", [*sorted(ANYTIME), "finetune pet=adapter", "randumb learner.gamma=0.01"])
def test_looks_change_no_number_of_training(tmp_path, words):
    stream = ["scenario=til_digits"] if words in DISCLOSED else []
    model = ["model=mlp"] if words in ("laftr", "sfr") else []
    words = [*stream, *model, f"learner={words.split()[0]}", *words.split()[1:], "learner.batch_size=4", "feature_store=off"]
    without, looked = run(tmp_path / "without", *words), run(tmp_path / "looked", *words, LOOKS)
    ends = [r for r in looked["rows"] if r["step"] is None]
    assert len(looked["rows"]) == len(ends) + 6 and ends == without["rows"]
    same = ("final_state_sha256", "passes", "visits", "steps", "experiences", "exemplars", "stored_bytes", "parameters")
    assert {key: looked[key] for key in same} == {key: without[key] for key in same}
    assert looked["scenario"]["manifest_sha256"] != without["scenario"]["manifest_sha256"]
    assert looked["run_id"] != without["run_id"]
    assert "looks" in looked["seconds"] and "looks" not in without["seconds"]


class Frozen(Finetune):
    """A head on a frozen network, whose features are remembered."""

    def __init__(self, model, runtime):
        super().__init__(model, runtime, batch_size=4)
        model.freeze()


@pytest.mark.parametrize("store", ["off", "on"])
def test_looks_at_a_frozen_network_count_each_image_once(tmp_path, monkeypatch, store):
    monkeypatch.setenv("CLBENCH_CACHE", str(tmp_path / "cache"))
    found = []
    for operators in ([], [{"looks": {"number": 3}}]):
        options = [*TINY, *EXACT, f"results_dir={tmp_path / str(len(found))}", "on_error=raise", f"feature_store={store}"]
        config = compose(options)[0]
        config["learner"], config["scenario"]["operators"] = {"_target_": f"{__name__}.Frozen"}, operators
        assert run_job(config).status == "ok"
        found.append(stored(tmp_path / str(len(found))))
    without, looked = found
    assert len(looked["rows"]) == len(without["rows"]) + 6
    sums = [sum(record["passes"].values()) for record in found]
    assert sums[0] == sums[1] and looked["final_state_sha256"] == without["final_state_sha256"]
    assert looked["passes"] == without["passes"] or store == "on"


def test_seconds_of_looks_are_not_those_of_training(tmp_path, monkeypatch):
    offset, plain = [0.0], ImageStream._rows

    def slow(self, index, step):
        offset[0] += 1000 if step is not None else 0
        return plain(self, index, step)

    real = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: real() + offset[0])
    monkeypatch.setattr(ImageStream, "_rows", slow)
    seconds = run(tmp_path, "learner=finetune", "learner.batch_size=4", LOOKS)["seconds"]
    assert 6000 < seconds["looks"] < 6500
    assert 0 < seconds["learn"] < 500 and 0 < seconds["fit:train"] < 500 and seconds["total"] > 6000


def test_no_look_where_there_should_be_one_is_an_error(tmp_path):
    """A learner that makes fewer passes than the first look needs."""
    words = ("learner=finetune", "learner.batch_size=4", "learner.epochs=1", "scenario.budget.epochs=10")
    with pytest.raises(UserError, match=r"experience 0: no look took place: Finetune trains on 12 samples through fit, .* 30"):
        run(tmp_path, *words, LOOKS)


class Spy:
    """A learner whose modules, direct and in a list, notice the mode that they are in when a step begins."""

    def __init__(self, training):
        self.net, self.more = torch.nn.Linear(2, 2), [torch.nn.Dropout(), {"a": torch.nn.BatchNorm1d(2)}]
        for module in self.modules():
            module.train(training)

    def modules(self):
        return [self.net, self.more[0], self.more[1]["a"]]


@pytest.mark.parametrize("training", [True, False])
def test_modes_come_back(training):
    spy = Spy(training)
    spy.more[0].train(not training)
    before = [module.training for module in spy.modules()]
    with looks.modes_kept(spy):
        for module in spy.modules():
            module.train(not module.training)
    assert [module.training for module in spy.modules()] == before
    with pytest.raises(KeyError), looks.modes_kept(spy):
        spy.net.train(not training)
        raise KeyError
    assert [module.training for module in spy.modules()] == before


# resume

RESUME = (*TINY, *EXACT, "learner=replay", "learner.batch_size=4", "checkpoint_seconds=0", LOOKS)


@pytest.mark.parametrize("kill_at", [(0, 2), (1, 1), (1, 3)])
def test_stopped_after_a_look_and_resumed(tmp_path, monkeypatch, kill_at):
    """Gone without a word after a step of an experience; the same command ends with the same rows."""
    straight = run(tmp_path / "straight", *RESUME)
    plain = ImageLooks.at_step

    class Killed(BaseException):
        pass

    def dies(self, name, place, lr, visits):
        looked = plain(self, name, place, lr, visits)
        self.spent += 1000 if looked and self.stream.runtime.experience == kill_at[0] else 0  # as if the look took so long
        if (place.experience, place.step) == kill_at:
            raise Killed
        return looked

    monkeypatch.setattr(ImageLooks, "at_step", dies)
    with pytest.raises(Killed):
        run(tmp_path / "killed", *RESUME)
    monkeypatch.setattr(ImageLooks, "at_step", plain)
    assert stored(tmp_path / "killed")["status"] == "running"
    killed = run(tmp_path / "killed", *RESUME)
    for key in ("rows", "final_state_sha256", "visits", "steps", "experiences", "run_id"):
        assert killed[key] == straight[key], key
    places = [(r["experience"], r["step"]) for r in killed["rows"]]
    assert len(set(places)) == len(places) == 8
    assert 0 < killed["seconds"]["learn"] < 500, "looks of the killed process are taken from the time of this one"


def test_asked_to_stop_inside_a_look(tmp_path, monkeypatch):
    """The look is finished and in the snapshot: the run goes on behind it."""
    straight = run(tmp_path / "straight", *RESUME)
    plain, done = ImageLooks.at_step, []

    def stopped(self, name, place, lr, visits):
        if not done and self.stream.runtime.experience == 1 and self.due_at and visits >= self.due_at[0]:
            self.stream.runtime.stop = True
            done.append(place.step)
        return plain(self, name, place, lr, visits)

    monkeypatch.setattr(ImageLooks, "at_step", stopped)
    words = [*RESUME, f"results_dir={tmp_path / 'stopped'}", "on_error=raise"]
    words[words.index("checkpoint_seconds=0")] = "checkpoint_seconds=1000"
    assert run_job(compose(words)[0]).status == "interrupted"
    (snapshot,) = (tmp_path / "stopped" / "runs").glob("*/journal/fit-0.pt")
    assert snapshot.exists()
    assert run_job(compose(words)[0]).status == "ok"
    found = stored(tmp_path / "stopped")
    assert found["rows"] == straight["rows"] and found["final_state_sha256"] == straight["final_state_sha256"]


# refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("learner=ncm", LOOKS), "does not fit scenario cil_digits: it cannot be asked inside an experience (anytime)"),
        (("learner=slca", LOOKS), "does not fit scenario cil_digits: it cannot be asked inside an experience (anytime)"),
        (("learner=joint", "learner.mode=probe", LOOKS), "it cannot be asked inside an experience (anytime)"),
        (("scenario.operators=[looks]",), "looks needs one of number and every"),
        (("scenario.operators=[{looks: {number: 3, every: 2}}]",), "looks needs one of number and every"),
        (("scenario.operators=[{looks: {number: 0}}]",), "looks.number and looks.every must be at least 1"),
        (("scenario.operators=[{looks: {number: -1}}]",), "looks.number"),
        (("scenario.operators=[{looks: {every: 2.5}}]",), "every must be int"),
        (("scenario.operators=[{looks: {every: 1000}}]",), "looks has no effect: no experience has more than 32 visits"),
        (("scenario.operators=[{looks: {numbre: 3}}]",), "did you mean 'number'?"),
        (("scenario.operators=[look]",), "no operator 'look'; did you mean 'looks'?"),
    ],
)
def test_refused_when_planned(clbench, words, message):
    words = (*SMALL, *(("learner=finetune",) if not words[0].startswith("learner=") else ()), *words)
    for command in ("plan", "run"):
        done = clbench(command, *words, code=2)
        assert message in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not list((clbench.folder / "results").glob("records/*"))


def test_looks_of_a_stream_of_texts_are_refused(clbench):
    err = clbench("run", "scenario=cpt_synthetic", "learner=constant_lr", f"+{LOOKS}", code=2).stderr
    assert err.startswith("clbench: ") and err.count("\n") == 1 and "operators" in err


def test_places():
    stream = class_incremental(
        "s", "digits", sizes=[1, 2], num_classes=3, limit_train=10, operators=[{"looks": {"number": 3}}], budget={"epochs": 2}
    )
    assert stream.manifest.looks == ((5, 10, 15), (10, 20, 30))
    once = class_incremental("s", "digits", sizes=[3], num_classes=3, limit_train=1, operators=[{"looks": {"number": 9}}])
    visits = 3 * once.budget.epochs
    assert once.manifest.looks == (tuple(range(1, visits)) if visits <= 10 else once.manifest.looks[0],)
    assert all(0 < place < visits for place in once.manifest.looks[0])


# the contract suite


class Plain:
    """A learner that may be asked at any time, or breaks the promise in one way."""

    capabilities = Capabilities(anytime=True)

    def __init__(self, model, runtime, *, fault: str = "none"):
        self.model, self.runtime, self.fault = model, runtime, fault
        self.weight, self.width, self.asked, self.inside = torch.zeros(64, 0), 0, torch.zeros(()), False

    def x(self, batch):
        return batch.x.mean(1).flatten(1)[:, :64]

    def learn(self, experience):
        if self.fault != "width":
            self.width = experience.num_seen
        more = torch.zeros(64, experience.num_seen - self.weight.shape[1])
        self.weight = torch.cat([self.weight, more], 1).requires_grad_()
        data, self.inside = experience.train, True

        def loss(batch):
            z = self.x(batch) @ self.weight
            return torch.nn.functional.cross_entropy(z, batch.y) + 0 * self.asked + 0.1 * self.asked * z.square().mean()

        class Batches:
            steps = 3

            def __call__(self, step):
                return data.batch(range(4 * step, 4 * step + 4), key=step)

        if self.fault != "no fit":
            fit(self.runtime, "train", self, [{"params": [self.weight], "lr": 0.1}], loss, Batches(), Recipe())
        self.weight, self.width, self.inside = self.weight.detach(), experience.num_seen, False
        return {}

    def predict(self, batch):
        z = self.x(batch) @ self.weight
        if self.inside and self.fault == "changes":
            self.asked += 1
        if self.inside and self.fault == "nan":
            z = z * float("nan")
        return z[:, : self.width]

    def state_dict(self):
        return {"weight": self.weight.detach()}

    def load_state_dict(self, state):
        self.weight = state["weight"].clone()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("none", None),
        ("changes", "asked inside learn, it ends in another state"),
        ("nan", "NaN or infinite scores after step 1 of experience 0"),
        ("width", "predict gave 0 columns after step 1 of experience 0, 3 classes were seen"),
        ("no fit", "nobody can ask"),
    ],
)
def test_the_contract_asks_anytime_learners(fault, message):
    config = compose([])[0]
    config["learner"] = {"_target_": f"{__name__}.Plain", "fault": fault}
    trial = Trial(config, small_stream(), Capabilities(anytime=True))
    if message is None:
        check_anytime(trial)
        return
    with pytest.raises(AssertionError, match=message):
        check_anytime(trial)


def test_own_learners_keep_the_promise():
    config = compose(["learner=derpp", "learner.batch_size=16"])[0]
    check_anytime(Trial(config, small_stream(), declared(load_target(config["learner"]["_target_"]), config["learner"])))
