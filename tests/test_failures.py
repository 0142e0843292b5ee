"""A run that fails at an exact place keeps what is saved: the same command goes on, and ends as if nothing had happened."""

import pathlib
from typing import ClassVar

import pytest
import torch

from clbench.config import compose
from clbench.interfaces import BudgetExceeded, UserError
from clbench.learners.pretrain import Pretrain
from clbench.learners.replay import Replay
from clbench.records import record
from clbench.run import runner
from clbench.training import checkpoint
from clbench.training.checkpoint import Journal, unpack

IMAGES = (
    "learner=replay",
    "model=nano_random",
    "scenario.num_classes=6",
    "scenario.limit_train=12",
    "scenario.limit_test=6",
    "scenario.budget.epochs=2",
    "learner.batch_size=6",
)  # three experiences of 8 steps
TEXTS = (
    "scenario=cpt_synthetic",
    "scenario.symbols=8",
    "scenario.states=8",
    "scenario.order=[0,1]",
    "scenario.tokens=768",
    "scenario.context=8",
    "scenario.batch=8",
    "scenario.eval_tokens=320",
    "scenario.probe_sequences=2",
    "scenario.probe_evenly=2",
    "model.width=16",
    "model.depth=1",
    "model.heads=2",
    "learner=infinite",
    "learner.replay.share=0.25",
)  # two experiences of 12 steps, the last 2 of each a branch
ALWAYS = ("num_threads=1", "device=cpu", "arithmetic=reference", "feature_store=off")
SAME_IMAGES = ("run_id", "correct", "class_correct", "final_state_sha256", "visits", "steps", "experiences")
SAME_TEXTS = ("run_id", "sum_loss", "sum_loss_start", "sum_loss_trunk", "curves", "ledger", "plan", "final_state_sha256")


class Doomed:
    """What fails where; places that were reached are written down. A place is "experience:step", ":end" or "evaluate"."""

    fail: tuple[str, BaseException] | None = None
    built = 0
    reached: ClassVar[list[str]] = []
    nan_at = ""

    @classmethod
    def here(cls, place):
        Doomed.reached.append(place)
        if Doomed.fail is not None and Doomed.fail[0] == place:
            raise Doomed.fail[1]


class DoomedReplay(Replay):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        Doomed.built += 1

    def learn(self, experience):
        real, step = self.model.features, 0

        def features(batch):
            nonlocal step
            place = f"{experience.index}:{step}"
            Doomed.here(place)
            step += 1
            return real(batch) * (float("nan") if Doomed.nan_at == place else 1.0)

        self.model.features = features
        try:
            result = super().learn(experience)
        finally:
            del self.model.features
        Doomed.here(f"{experience.index}:end")
        self.last = experience.index
        return result

    def predict(self, batch):
        Doomed.here(f"{getattr(self, 'last', '?')}:evaluate")
        return super().predict(batch)


class DoomedPretrain(Pretrain):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        Doomed.built += 1

    def run(self, experience, plan, shares=None, after_step=None, owner=None):
        result = super().run(experience, plan, shares, lambda s, n, *_: Doomed.here(f"{s.experience}:{n}"), owner)
        Doomed.here(f"{experience.index}:end")
        self.last = experience.index
        return result

    def loss(self, tokens):
        if hasattr(self, "last"):
            Doomed.here(f"{self.last}:evaluate")
        return super().loss(tokens)


def job(folder, kind, *words):
    name, chosen = ("DoomedReplay", IMAGES) if kind == "images" else ("DoomedPretrain", TEXTS)
    target = f"learner._target_={__name__}.{name}"
    (made,) = compose.compose([*chosen, *ALWAYS, target, f"results_dir='{folder}'", *words])
    return made


@pytest.fixture(autouse=True)
def unharmed():
    Doomed.fail, Doomed.nan_at, Doomed.built, Doomed.reached = None, "", 0, []
    yield
    Doomed.fail, Doomed.nan_at = None, ""


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Records of runs that nothing happens to."""
    Doomed.fail = None
    folder = tmp_path_factory.mktemp("straight")
    return {kind: record.read(runner.run_job(job(folder, kind)).path) for kind in ("images", "texts")}


def numbers(entry, kind):
    return {key: entry[key] for key in (SAME_IMAGES if kind == "images" else SAME_TEXTS)}


def saved(folder):
    return sorted(path.name for path in pathlib.Path(folder).glob("runs/*/journal/*.pt"))


def fail(folder, kind, place, error, *words):
    """A run that fails at a place -> outcome and record."""
    Doomed.fail = (place, error)
    outcome = runner.run_job(job(folder, kind, *words))
    Doomed.fail, Doomed.reached = None, []
    assert outcome.status == "failed", outcome
    return outcome, record.read(outcome.path)


SELDOM, OFTEN = "checkpoint_seconds=null", "checkpoint_seconds=0"
FAILURES = [
    ("images", "1:3", torch.OutOfMemoryError("CUDA out of memory"), SELDOM, "in experience 2 of 3", "after experience 1"),
    ("images", "1:3", MemoryError("a lot"), OFTEN, "in experience 2 of 3", "inside experience 2"),
    ("images", "2:end", OSError(28, "No space left on device"), SELDOM, "in experience 3 of 3", "after experience 2"),
    ("images", "1:evaluate", RuntimeError("stale handle"), SELDOM, "after experience 2 of 3", "after experience 2"),
    ("images", "2:evaluate", RuntimeError("at the very end"), SELDOM, "after experience 3 of 3", "after experience 3"),
    ("images", "1:2", BudgetExceeded("too many visits"), SELDOM, "in experience 2 of 3", "after experience 1"),
    ("texts", "1:5", torch.OutOfMemoryError("CUDA out of memory"), SELDOM, "in experience 2 of 2", "after experience 1"),
    ("texts", "1:11", MemoryError("in a branch"), OFTEN, "in experience 2 of 2", "inside experience 2"),
    ("texts", "0:evaluate", RuntimeError("stale handle"), SELDOM, "after experience 1 of 2", "after experience 1"),
]


@pytest.mark.parametrize(("kind", "place", "error", "often", "where", "goes_on"), FAILURES)
def test_a_failure_costs_at_most_its_experience(tmp_path, straight, kind, place, error, often, where, goes_on):
    outcome, entry = fail(tmp_path, kind, place, error, often)
    assert f"failed {where}: {type(error).__name__}: " in outcome.text
    assert outcome.text.endswith(f"; the same command goes on {goes_on}, force=true starts anew")
    index, number = int(place[0]), place.partition(":")[2]
    assert entry["error"]["experience"] == index
    assert entry["error"]["finished"] == index + (number == "evaluate")
    again = runner.run_job(job(tmp_path, kind, often))
    assert again.status == "ok", again
    entry = record.read(again.path)
    assert numbers(entry, kind) == numbers(straight[kind], kind) and entry["resumed"] == 1 and "process" not in entry
    held = ("exemplars", "exemplar_bytes", "stored_bytes")
    assert {key: entry.get(key) for key in held} == {key: straight[kind].get(key) for key in held}
    learned = {place.partition(":")[0] for place in Doomed.reached if not place.endswith("evaluate")}
    assert "0" not in learned, "the first experience is learned again"
    if number == "evaluate":
        assert str(index) not in learned
    if "inside" in goes_on:
        assert f"{index}:{0 if kind == 'images' else 1}" not in Doomed.reached[:1] or kind == "images"
    assert not saved(tmp_path), "snapshots are left behind"


def test_a_failure_before_the_first_end_starts_anew(tmp_path, straight):
    outcome, entry = fail(tmp_path, "images", "0:3", RuntimeError("boom"), SELDOM)
    assert "failed in experience 1 of 3: RuntimeError: boom; the same command starts anew" in outcome.text
    assert entry["error"]["experience"] == 0 and entry["error"]["finished"] == 0
    entry = record.read(runner.run_job(job(tmp_path, "images")).path)
    assert numbers(entry, "images") == numbers(straight["images"], "images") and entry["resumed"] == 0


@pytest.mark.parametrize("often", [SELDOM, OFTEN])
def test_what_fails_always_fails_in_the_same_place(tmp_path, often):
    error = BudgetExceeded("too many visits")
    told = [fail(tmp_path, "images", "1:end", error, often)[1]["error"] for _ in range(3)]
    assert all(one["experience"] == 1 and one["finished"] == 1 for one in told)
    assert len({(one["type"], one["message"]) for one in told}) == 1


def test_force_starts_anew(tmp_path, straight):
    fail(tmp_path, "images", "2:3", RuntimeError("boom"), SELDOM)
    assert saved(tmp_path) == ["experience.pt"]
    entry = record.read(runner.run_job(job(tmp_path, "images", "force=true")).path)
    assert "0:0" in Doomed.reached and entry["resumed"] == 0
    assert numbers(entry, "images") == numbers(straight["images"], "images")


def test_raise_keeps_the_checkpoint_too(tmp_path, straight):
    Doomed.fail = ("1:3", RuntimeError("boom"))
    with pytest.raises(RuntimeError, match="boom"):
        runner.run_job(job(tmp_path, "images", SELDOM, "on_error=raise"))
    Doomed.fail = None
    assert saved(tmp_path) == ["experience.pt"]
    entry = record.read(runner.run_job(job(tmp_path, "images", "on_error=raise")).path)
    assert entry["resumed"] == 1 and numbers(entry, "images") == numbers(straight["images"], "images")


def tensors(state):
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from tensors(value)


def test_no_snapshot_holds_weights_that_a_bad_loss_spoilt(tmp_path):
    """The experience goes on from its beginning; what is bad always is bad again, there."""
    Doomed.nan_at = "1:3"
    for attempt in range(2):
        outcome = runner.run_job(job(tmp_path, "images", OFTEN))
        entry = record.read(outcome.path)
        assert entry["error"]["type"] == "FloatingPointError" and entry["error"]["experience"] == 1
        assert "step 3 of 8" in entry["error"]["message"] and "goes on after experience 1" in outcome.text
        assert saved(tmp_path) == ["experience.pt"]
        (path,) = tmp_path.glob("runs/*/journal/experience.pt")
        state = unpack(torch.load(path, weights_only=True))
        assert all(torch.isfinite(t).all() for t in tensors(state) if t.is_floating_point())
        assert attempt == 0 or "0:0" not in Doomed.reached
        Doomed.reached = []


def test_a_full_disk_at_a_checkpoint(tmp_path, straight, monkeypatch):
    real = checkpoint.save_atomic

    def full(path, state):
        if state["experience"] == 1:
            raise UserError(f"cannot write the checkpoint {path}: No space left on device")
        real(path, state)

    monkeypatch.setattr(checkpoint, "save_atomic", full)
    outcome = runner.run_job(job(tmp_path, "images", SELDOM))
    assert outcome.status == "failed" and "No space left on device; the same command goes on after experience 1" in outcome.text
    monkeypatch.undo()
    entry = record.read(runner.run_job(job(tmp_path, "images")).path)
    assert entry["resumed"] == 1 and numbers(entry, "images") == numbers(straight["images"], "images")


@pytest.mark.parametrize("refused", [{"ok"}, {"ok", "failed"}])
def test_a_full_disk_at_the_record(tmp_path, straight, monkeypatch, refused):
    real = record.write

    def full(entry, folder):
        if entry["status"] in refused:
            raise UserError(f"cannot write {folder}: No space left on device")
        return real(entry, folder)

    monkeypatch.setattr(record, "write", full)
    outcome = runner.run_job(job(tmp_path, "images", SELDOM))
    assert outcome.status == "failed" and "goes on after experience 3" in outcome.text
    (path,) = (tmp_path / "records").glob("*.json")
    left = record.read(path)
    assert left["status"] == ("running" if "failed" in refused else "failed")
    assert record.is_dead(left, tmp_path) == ("failed" in refused)
    monkeypatch.undo()
    Doomed.reached = []
    entry = record.read(runner.run_job(job(tmp_path, "images")).path)
    assert numbers(entry, "images") == numbers(straight["images"], "images")
    assert {place.partition(":")[2] for place in Doomed.reached} <= {"evaluate"}, "an experience is learned again"


def test_a_snapshot_that_cannot_be_read(tmp_path, straight):
    """Inside an experience it is left out; at the end of one it is an error that says what helps."""
    fail(tmp_path, "images", "1:5", RuntimeError("boom"), OFTEN)
    (inside,) = tmp_path.glob("runs/*/journal/fit-0.pt")
    inside.write_bytes(inside.read_bytes()[:500])
    outcome, _ = fail(tmp_path, "images", "1:end", RuntimeError("later"), SELDOM)
    assert "goes on" in outcome.text
    (end,) = tmp_path.glob("runs/*/journal/experience.pt")
    end.write_bytes(b"PK")
    outcome = runner.run_job(job(tmp_path, "images"))
    assert outcome.status == "failed" and f"cannot read the checkpoint {end}" in outcome.text
    assert "force=true starts anew" in outcome.text
    entry = record.read(runner.run_job(job(tmp_path, "images", "force=true")).path)
    assert numbers(entry, "images") == numbers(straight["images"], "images")


def test_a_journal_says_where_it_stands(tmp_path):
    made = Journal(tmp_path, 0.0)
    assert (made.experience, made.finished, made.inside()) == (-1, 0, False)
    made.begin(0)
    made.save("fit-0", {"experience": 0})
    assert made.inside()
    made.finish_experience({"experience": 0})
    assert (made.experience, made.finished, made.inside()) == (0, 1, False)
    other = Journal(tmp_path, 0.0)
    assert other.load("experience") == {"experience": 0} and (other.experience, other.finished) == (0, 1)
    other.begin(1)
    other.save("fit-0", {"experience": 1})
    other.forget_fits()
    assert not other.inside() and other.finished == 1


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_a_learner_is_built_once(tmp_path, kind):
    outcome = runner.run_job(job(tmp_path, kind))
    assert outcome.status == "ok" and Doomed.built == 1
    again = runner.prepare(job(tmp_path, kind))
    runner.repeat(again, record.read(outcome.path)["machine"]["flags"], 1)
    assert Doomed.built == 2


def test_the_learner_that_was_asked_for_its_plan_is_trained(tmp_path, monkeypatch):
    asked, trained = [], []
    plan, learn = Pretrain.plan, Pretrain.learn
    monkeypatch.setattr(Pretrain, "plan", lambda self, e: asked.append((id(self), len(trained))) or plan(self, e))
    monkeypatch.setattr(Pretrain, "learn", lambda self, e: trained.append(id(self)) or learn(self, e))
    assert runner.run_job(job(tmp_path, "texts")).status == "ok"
    assert len({*trained, *(one for one, _ in asked)}) == 1 and [at for _, at in asked[:2]] == [0, 0]


def test_a_twin_that_ends_before_the_lock_is_taken_makes_a_skip(tmp_path, monkeypatch):
    from filelock import FileLock

    first = runner.run_job(job(tmp_path, "images"))
    assert first.path is not None
    done, take = first.path.read_text(), FileLock.acquire
    first.path.unlink()

    def late(self, *args, **options):
        if self.lock_file.endswith("lock") and "/runs/" in self.lock_file:
            first.path.write_text(done)
        return take(self, *args, **options)

    monkeypatch.setattr(FileLock, "acquire", late)
    Doomed.reached = []
    outcome = runner.run_job(job(tmp_path, "images"))
    assert outcome.status == "skipped" and not Doomed.reached and first.path.read_text() == done


def test_a_learner_that_cannot_be_built_is_refused_and_leaves_no_record(clbench, small):
    done = clbench("run", "learner=bn_adapt", "scenario.operators=[test_time]", *small, code=2)
    assert done.stderr == "clbench: learner bn_adapt: model nano has no BatchNorm, nothing would change\n"
    assert clbench.records() == []


def test_rows_of_the_matrix_are_numbered_by_the_experiences_learned(clbench, small):
    words = ("scenario.operators=[{repeat:{how:tasks,experiences:5,samples:2}},{evaluate:{every:2}}]", *small)
    lines = clbench("run", "learner=ncm", *words).stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("after"))
    assert [line.split()[0] for line in lines[first + 1 : first + 4]] == ["2", "4", "5"]
