"""Verdicts: what is verified, what is only self-reported, what fails; repeats of the first experiences; older schemas."""

import copy
import json
import math
import pathlib
import sys

import numpy as np
import pytest

from clbench.cli import verify_command
from clbench.config.compose import compose
from clbench.interfaces import UserError
from clbench.records import migrations, record, rerun, verify_artifacts
from clbench.records.verify import verdicts, verify
from clbench.report import report
from clbench.report.runs import is_legacy, summarize

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from test_report import made

HERE = pathlib.Path(__file__).parent
NANO = json.loads((verify_artifacts.MODELS / "nano.json").read_text())["sha256"]
STATE = "9ec6710f5aa74dd2ea829041b3fb519a270b3502b14a735ba64042a4d75603a8"


def stream():
    """The manifest of the stream that `made` describes."""
    from clbench.streams.manifest import EvalEntry, ExperienceEntry, Manifest

    budget = dict.fromkeys(("sample_visits", "exemplars", "exemplar_bytes", "stored_bytes")) | {"epochs": 1}
    steps = [ExperienceEntry(k, None, (i,), np.arange(20) + 20 * i) for i, k in enumerate("ab")]
    sets = [EvalEntry(k, None, (i,), np.arange(10) + 40 + 10 * i, i) for i, k in enumerate("ab")]
    data = {"name": "d", "sha256": "d" * 64, "num_samples": 60}
    return Manifest("class_incremental", data, (0, 1), tuple(steps), tuple(sets), False, True, budget)


def bins(n, right, sure=0.7):
    """A row of calibration: all samples in one bin."""
    b = math.ceil(sure * 15) - 1
    row = {"n": n, "nll": 0.5 * n, "brier": 0.3 * n}
    row |= {name: [value if i == b else 0 for i in range(15)] for name, value in (("bin_n", n), ("bin_correct", right))}
    return row | {"bin_conf": [sure * n if i == b else 0.0 for i in range(15)]}


def whole(seed=0, **changes):
    """A record with everything that can be checked, and nothing that is wrong."""
    entry = made(seed)
    config = {
        "seed": seed,
        "scenario": {"_target_": "clbench.streams.generators.class_incremental", "name": "cil", "dataset": "digits"},
        "model": {"_target_": "clbench.models.backbone.build_backbone", "name": "nano", "timm": "vit_tiny_patch16_224"},
        "learner": {"_target_": "clbench.learners.ncm.NearestClassMean", "metric": "cosine"},
    }
    model = {"name": "nano", "timm": "vit_tiny_patch16_224", "source": "package:nano.safetensors", "file_sha256": NANO}
    manifest = stream()
    entry["scenario"] |= {"manifest_sha256": manifest.sha256, "budget": dict(manifest.budget)}
    entry |= {"config": config, "model": model | {"state_sha256": STATE}}
    entry["learner"] |= {"target": "clbench.learners.ncm.NearestClassMean"}
    entry["calibration"] = {"bins": 15, "table": [bins(10, 8), bins(20, 15)]}
    entry["task_confusion"] = [[[10, 0], None], [[7, 3], [0, 10]]]
    return sealed(entry | changes)


def sealed(entry):
    """With the run id of its content."""
    parts = (entry["scenario"]["manifest_sha256"], entry["model"]["state_sha256"], entry["learner"]["plugin"])
    return entry | {"run_id": record.run_id(entry["config"], *parts, entry["numbers_version"])}


@pytest.fixture
def folder(tmp_path):
    def write(*entries):
        for entry in entries:
            record.write(entry, tmp_path / "records")
        stream().save(tmp_path / "manifests" / f"{stream().sha256}.json")
        return tmp_path

    return write


def one(results):
    (verdict,) = [v for v in verdicts(results) if v.verdict != "note"]
    return verdict


def test_a_whole_record_is_verified(folder):
    results = folder(whole())
    assert verify(results) == (
        f"verified       {whole()['run_id']}.json\n1 records: 1 verified, 0 self-reported, 0 failed",
        0,
    )
    assert one(results / "records" / f"{whole()['run_id']}.json").verdict == "verified"


def deep(entry, path, value):
    entry = copy.deepcopy(entry)
    inner = entry
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return entry


GAPS = {
    "random weights": (("model",), {"name": "nano", "source": "none", "file_sha256": None, "state_sha256": "a" * 64}, None),
    "other weights": (("model", "source"), "mine.safetensors", "weights mine.safetensors"),
    "timm": (("model", "file_sha256"), None, "no file and hash of its weights"),
    "another state": (("model", "state_sha256"), "b" * 64, "cannot be compared without building the model"),
    "another stream": (("scenario", "manifest_sha256"), "c" * 64, "its manifest is not at hand"),
    "a plug-in": (("learner", "plugin"), "others 1.0 0123", "plug-in others 1.0 0123 is not installed here"),
    "an option that is gone": (("config", "learner", "gone"), 1, "its configuration no longer resolves: learner.gone"),
    "a class that is gone": (("config", "scenario", "_target_"), "clbench.streams.old.make", "no longer resolves"),
    "older numbers": (("numbers_version",), 0, "other code made its numbers (numbers_version 0"),
}


@pytest.mark.parametrize("what", GAPS)
def test_what_cannot_be_checked_here_is_self_reported(folder, what, monkeypatch):
    monkeypatch.delenv("CLBENCH_DATA", raising=False)
    path, value, words = GAPS[what]
    entry = deep(whole(), path, value)
    if what == "other weights":
        entry["model"]["file_sha256"] = "e" * 64
    verdict = one(folder(sealed(entry)))
    assert verdict.verdict == ("verified" if words is None else "self-reported"), verdict
    assert words is None or words in verdict.reasons[0]


def test_weights_that_lie_here_are_hashed(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("CLBENCH_DATA", raising=False)
    data = tmp_path / "data"
    data.mkdir()
    (data / "mine.safetensors").write_bytes((verify_artifacts.MODELS / "nano.safetensors").read_bytes())
    results = folder(sealed(deep(whole(), ("model", "source"), "mine.safetensors")))
    assert one(results).verdict == "self-reported"
    assert verdicts(results, str(data))[0].verdict == "verified"
    monkeypatch.setenv("CLBENCH_DATA", str(data))
    assert one(results).verdict == "verified"
    (data / "other").mkdir()
    (data / "other" / "mine.safetensors").write_bytes(b"something else")
    (verdict,) = verdicts(results, str(data / "other"))
    assert verdict.verdict == "self-reported" and "here have SHA-256" in verdict.reasons[0]


FAILS = {
    "packaged weights": (("model", "file_sha256"), "e" * 64, "package:nano.safetensors has SHA-256"),
    "pinned weights": (("config", "model", "sha256"), "e" * 64, "its configuration asks for eeee"),
    "its model's name": (("model", "name"), "vit_base", "model.name is vit_base, its configuration says nano"),
    "its scenario's name": (("scenario", "name"), "hard", "scenario.name is hard"),
    "its class": (("learner", "target"), "clbench.learners.mos.Mos", "its configuration says clbench.learners.ncm"),
    "a mark": (("learner", "capabilities"), {"stores_all_data": True}, "lacks the mark reference"),
    "a mark of its tuning": (("tuning",), {"marks": ["test_tuned"]}, "lacks the mark test_tuned"),
    "bins": (("calibration", "table", 1, "bin_n", 3), 1, "holds 20 samples, 21 in bins"),
    "right answers": (("calibration", "table", 0), bins(10, 9), "has 9 right answers, correct has 8"),
    "confidence": (("calibration", "table", 0, "bin_conf", 10), 9.0, "bin 10 holds 10 samples"),
    "nll": (("calibration", "table", 0, "nll"), 1e5, "more than 10 samples can give"),
    "a sum": (("task_confusion", 1, 0), [7, 4], "sums to 11, n is 10"),
    "too few": (("task_confusion", 1, 0), [5, 5], "has 5 predictions into the set's own experiences, 6 are right"),
    "the future": (("task_confusion", 0, 0), [9, 1], "predicts classes of experiences to come"),
    "an unseen set": (("task_confusion", 0, 1), [0, 10], "task_confusion[0][1] is there, correct[0][1] is None"),
    "a missing set": (("task_confusion", 1, 1), None, "task_confusion[1][1] is null"),
}


@pytest.mark.parametrize("what", FAILS)
def test_what_contradicts_itself_fails(folder, what):
    path, value, words = FAILS[what]
    results = folder(sealed(deep(whole(), path, value)))
    verdict = one(results)
    assert verdict.verdict == "failed" and any(words in reason for reason in verdict.reasons), verdict
    assert verify(results)[1] == 1


def test_a_borrowed_name_fails(folder):
    from clbench.cli.verify_command import targets

    entry = whole()
    entry["learner"]["name"] = "mos"
    results = folder(sealed(entry))
    text, code = verify(results, targets=targets())
    assert code == 1 and "it calls itself mos, which is clbench.learners.mos.Mos" in text
    assert verify(folder(whole()), targets=targets())[1] == 0


def test_a_seal_that_was_broken_fails(folder):
    results = folder(whole())
    path = results / "records" / f"{whole()['run_id']}.json"
    path.write_text(path.read_text().replace('"nll": 5.0', '"nll": 4.0'))
    assert one(results).reasons == ("its checksum does not fit its content",)


def test_far_below_chance_is_noted(folder):
    """20 samples of 2 classes: chance 10 with a standard error of sqrt(20 / 4) = 2.24; 3 is below 10 - 6.7, 4 is not."""
    for right, noted in ((3, True), (4, False)):
        entry = made(correct=((8, None), (1, right - 1)))
        text, _ = verify(folder(entry))
        assert ("far below chance (0.5000 ± 0.1118)" in text) == noted, text


def test_changed_code_is_counted_and_not_refused(folder):
    text, code = verify(folder(whole(git={"revision": "a" * 40, "dirty": True})))
    assert code == 0 and text.endswith("1 of them say that clbench had changes that were not committed when they ran")
    assert "1 verified" in text


def machine(**changes):
    flags = {"num_threads": 1, "matmul": "medium", "fused_attention": False, "deterministic": True}
    return {"machine": {"device": "cpu", "cpu": "A", "flags": flags} | changes, "versions": dict.fromkeys(rerun._VERSIONS, "1")}


def again(**changes):
    keys = ("n", "first_seen", "correct", "correct_masked", "correct_top5", "class_correct")
    return {key: copy.deepcopy(whole()[key]) for key in keys} | machine() | changes


def test_an_equal_repeat_is_verified():
    verdict = rerun.compare("x", whole() | machine(), again())
    assert (verdict.verdict, verdict.notes) == ("verified", ("repeated 2 experiences: all 12 counts are equal",))
    other = rerun.compare("x", whole() | machine(cpu="B"), again())
    assert other.verdict == "verified" and "although the machine differs: processor B then, A now" in other.notes[0]
    old = rerun.compare("x", whole() | {"machine": {"device": "cpu"}}, again())
    assert old.verdict == "verified" and "processor unknown then" in old.notes[0]


def test_one_count_more_fails_on_the_same_machine_only():
    moved = again(correct=[[8, None], [6, 8]], class_correct=[[[8], None], [[6], [8]]])
    same = rerun.compare("x", whole() | machine(), moved)
    text = "2 of 12 counts differ, accuracy[1].correct[1] most: the record says 9 of 10, the repeat 8"
    assert same.verdict == "failed" and text in same.reasons[0]
    assert "on the same processor with the same versions and flags" in same.reasons[0]
    there = rerun.compare("x", whole() | machine(cpu="B"), moved)
    assert there.verdict == "verified" and "within the tolerance (3 standard errors, at least 2 samples)" in there.notes[0]


def test_the_tolerance_by_hand():
    """n 100, count 80: p = 81 / 102, error sqrt(100 p (1 - p)) = 4.04, allowed 12.1; all right of 10: at least 2."""
    error, allowed = rerun.tolerance(100, 80)
    assert math.isclose(error, math.sqrt(100 * 81 / 102 * 21 / 102)) and math.isclose(allowed, 3 * error)
    assert rerun.tolerance(2, 2)[1] == 2.0
    far = again(correct=[[8, None], [0, 9]], class_correct=[[[8], None], [[0], [9]]])
    verdict = rerun.compare("x", whole() | machine(cpu="B"), far)
    assert verdict.verdict == "failed" and "beyond the tolerance" in verdict.reasons[1]
    assert rerun.compare("x", whole() | machine(), again(n=[10, 9])).verdict == "failed"


def test_a_repeat_from_the_command_line(clbench, small):
    """An honest record repeats exactly; one with invented counts, consistent and sealed again, does not; drawing is seeded."""
    clbench("run", "learner=ncm", *small, "num_threads=1", "device=cpu")
    assert clbench("verify").stdout.count("verified") == 2
    assert "all 15 counts are equal" in clbench("verify", "results", "--rerun", "1").stdout
    path = next((clbench.folder / "results" / "records").glob("*.json"))
    assert "1 repeated: 1 verified" in clbench("verify", "--rerun", str(path)).stdout
    entry = record.read(path)
    for key in ("calibration", "task_confusion"):
        del entry[key]
    worse = entry["class_correct"][0][0]
    worse[0] -= 3
    entry["correct"][0][0] -= 3
    record.write(entry, path.parent)
    assert clbench("verify").returncode == 0
    text = clbench("verify", "--rerun", str(path), code=1).stdout
    assert "failed" in text and "counts differ" in text and "on the same processor" in text


def test_a_repeat_that_cannot_be(clbench, tmp_path):
    def put(entry):
        return str(record.write(sealed(entry), clbench.folder / "results" / "records"))

    evil = deep(whole(), ("config", "learner", "_target_"), "os.system")
    evil["learner"]["target"] = "os.system"
    err = clbench("verify", "--rerun", put(evil), code=2).stderr
    assert "learner._target_ is os.system, which no configuration file here names: it is not run" in err
    err = clbench("verify", "--rerun", put(deep(whole(), ("config", "learner", "metric"), "${oc.env:HOME}")), code=2).stderr
    assert "interpolation" in err and "Traceback" not in err
    data = deep(whole(), ("config", "scenario", "dataset"), "cifar100")
    clbench.env.pop("CLBENCH_DATA", None)
    err = clbench("verify", "--rerun", put(data), code=2).stderr
    assert "cannot be repeated here" in err and "cifar100" in err and len(err.strip().splitlines()) == 2
    assert "does not exist" in clbench("verify", "--rerun", "nowhere.json", code=2).stderr
    assert "has no effect" in clbench("verify", "--seed", "1", code=2).stderr
    out = clbench("verify", "results", "--rerun", "9").stdout
    assert out.count("self-reported") == 3 and "3 repeated: 0 verified" in out


OLD = HERE / "schema_0.json"


def test_a_record_of_schema_0_is_read_and_marked(tmp_path):
    entry = record.read(OLD)
    assert entry["schema"] == record.SCHEMA and entry["marks"] == ["legacy"] and entry["numbers_version"] == 0
    assert entry["first_seen"] == [0, 1] and entry["seconds"] == {"total": 1.5} and entry["error"] is None
    assert "schema" not in json.loads(OLD.read_text()), "the file stays as it is"
    folder = tmp_path / "records"
    folder.mkdir()
    (folder / f"{entry['run_id']}.json").write_text(OLD.read_text())
    (verdict,) = verdicts(tmp_path)
    assert verdict.verdict == "self-reported"
    assert any("other code made its numbers (numbers_version 0" in reason for reason in verdict.reasons)
    report(tmp_path)
    assert ",legacy," in (tmp_path / "leaderboard.csv").read_text()


def test_a_legacy_record_never_shares_a_row(tmp_path):
    entry = record.read(OLD)
    folder = tmp_path / "records"
    folder.mkdir()
    (folder / f"{entry['run_id']}.json").write_text(OLD.read_text())
    record.write(made(0), folder)
    report(tmp_path)
    assert (tmp_path / "leaderboard.csv").read_text().count("\n") == 3


def test_an_old_record_that_was_changed_is_not_migrated(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(OLD.read_text().replace('"seed": 7', '"seed": 8'))
    with pytest.raises(UserError, match="checksum does not fit its content, so it is not migrated"):
        record.read(path)


def test_first_seen_is_derived_or_missed():
    old = json.loads(OLD.read_text())
    assert migrations.migrate({k: v for k, v in old.items() if k != "eval_classes"}, 1)["first_seen"] == [0, 1]
    bare = {k: v for k, v in old.items() if k not in ("eval_classes", "correct")}
    assert record.fault(migrations.migrate(bare, 1)) == "key 'first_seen' is missing"
    assert not migrations.is_old({"anything": 1}, 1) and not migrations.is_old(made(), 1)


def lowered(version):
    """A run with precision=bf16 under this version of its numbers."""
    return sealed(deep(whole(), ("config", "precision"), "bf16") | {"numbers_version": version})


def test_a_change_that_moves_bf16_alone_leaves_the_other_records_their_standing(folder):
    """fp32: version 1 is this code's, and a part of the run's identity as it was; bf16: version 2, and 1 is legacy."""
    assert record.numbers_version({"precision": "bf16"}) == 2
    assert record.numbers_version({"precision": "fp32"}) == record.numbers_version({}) == record.NUMBERS_VERSION == 1
    for entry, legacy in ((whole(), False), (lowered(2), False), (lowered(1), True)):
        assert (
            is_legacy(entry) == legacy and summarize(entry).legacy == legacy and ("legacy" in summarize(entry).marks) == legacy
        )
        parts = (entry["scenario"]["manifest_sha256"], entry["model"]["state_sha256"], entry["learner"]["plugin"])
        assert (record.run_id(entry["config"], *parts) == entry["run_id"]) == (not legacy)
    verdict = one(folder(lowered(1)))
    assert verdict.verdict == "self-reported"
    assert verdict.reasons == ("other code made its numbers (numbers_version 1, here 2)",)
    assert summarize(lowered(1)).values == summarize(lowered(2)).values == summarize(whole()).values


@pytest.mark.parametrize(
    ("learner", "version"),
    [
        ("coda_prompt", 2),
        ("ovor", 2),
        ("l2p_pp", 2),
        ("l2p", 1),
        ("dualprompt", 1),
        ("dualprompt learner.compat_reshape=true", 2),
        ("mos", 1),
        ("mos learner.variant=official_raw", 2),
        ("joint", 1),
    ],
)
def test_learners_whose_numbers_moved_have_a_later_version(learner, version):
    (config,) = compose(f"learner={learner}".split())
    assert record.numbers_version(config) == version


def test_a_record_of_other_code_is_not_repeated(folder, monkeypatch):
    monkeypatch.setattr(verify_command, "_again", lambda *parts: pytest.fail("repeated"))
    results = folder(lowered(1))
    (path,) = (results / "records").iterdir()
    text, code = verify_command.repeat(path, 1, 0, None)
    why = "it cannot be repeated count for count: other code made its numbers (numbers_version 1, here 2)"
    assert code == 0 and text.splitlines() == [f"self-reported  {path.name}  {why}", "1 repeated: 0 verified"]
    with pytest.raises(UserError, match="no finished record to repeat"):
        verify_command.repeat(results, 1, 0, None)


def test_committed_records_keep_their_identity():
    """Every record has the run id that this code gives, or, of numbers of an older version, that of the code before."""
    kinds = {"fp32": 0, "bf16": 0}
    for entry in record.entries(HERE.parent / "results" / "records", []):
        parts = (entry["scenario"]["manifest_sha256"], entry["model"]["state_sha256"], entry["learner"]["plugin"])
        lower = entry["numbers_version"] < record.numbers_version(entry["config"])
        raised = {"clbench.learners.coda_prompt.CodaPrompt", "clbench.learners.ovor.Ovor", "clbench.learners.l2p.L2p"}
        assert not lower or entry["config"]["precision"] == "bf16" or entry["config"]["learner"]["_target_"] in raised
        assert is_legacy(entry) == lower
        assert record.run_id(entry["config"], *parts, 1 if lower else None) == entry["run_id"]
        kinds[entry["config"]["precision"]] += 1
    assert kinds["fp32"] > 200 and kinds["bf16"] > 90
