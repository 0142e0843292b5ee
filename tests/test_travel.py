"""Results that travel: submissions and their flags, archives and signatures, badges, parquet, Every Eval Ever."""

import json
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
import zipfile
from datetime import UTC, datetime, timedelta

import pytest
from conftest import ROOT

from clbench.interfaces import UserError
from clbench.records import record
from clbench.records.verify import Verdict, verdicts
from clbench.report.board import rank
from clbench.report.columns import ACCURACY
from clbench.report.runs import Filter, scan
from clbench.report.travel import archive, badge, every_eval, flags, parquet, submission

NOW = datetime(2026, 12, 1, tzinfo=UTC)
NCM = ("5535d0f9e11b7297", "9ebcc36ef33c35a2", "c31acd9fef774c36", "981e084938b7331f", "a4cca42b90bf48a5")  # seeds 0 to 4
JOINT = ("c8b1ba17f1d8bce6", "e42d98f93311df83", "62c9085f195a9687", "c74c9cc77cc84ecc", "0c8ac8d221d16c13")
MANIFEST = "332b26c07d9d9b74b4f834a079c1f46055017d2de6408bd7737c5b55c795ad22"


def copied(folder, run_ids, change=None):
    """A results folder of committed records; `change(record, seed)` makes others of them, sealed anew."""
    (folder / "records").mkdir(parents=True, exist_ok=True)
    (folder / "manifests").mkdir(exist_ok=True)
    shutil.copy(ROOT / "results" / "manifests" / f"{MANIFEST}.json", folder / "manifests")
    for run_id in run_ids:
        found = json.loads((ROOT / "results" / "records" / f"{run_id}.json").read_text())
        if change is not None:
            change(found, found["seed"])
            found["checksum"] = record.checksum(found)
        (folder / "records" / f"{run_id}.json").write_text(json.dumps(found))
    return folder


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    folder = copied(tmp_path_factory.mktemp("known"), JOINT)
    shutil.copy(ROOT / "results" / "cards.yaml", folder)
    return folder


def gathered(folder, known=None, repeated=(), **filters):
    return submission.gather(folder, Filter(**filters), verdicts(folder), repeated, known, NOW)


def test_a_submission_stands_beside_what_is_known(tmp_path, known):
    folder = copied(tmp_path, NCM)
    made = gathered(folder, known)
    (group,) = made.groups
    assert group.row["seeds"] == "0 1 2 3 4" and made.level(group) == "self-reported" and made.flags[0] == []
    text = submission.text(made, ROOT / "conf")
    assert (
        "| ncm | nano | 17164cd6 | 5 | 86.87 ± 0.00 |" in text and "| joint | nano |" in text and "| known reference |" in text
    )
    assert "83.40" in text and "table in RanPAC's repository" in text, "the published numbers of its card"
    assert "clbench run -m learner=ncm scenario=cil_digits model=nano seed=0,1,2,3,4" in text and "Nothing is odd." in text
    held = submission.files(made, folder, ROOT / "conf")
    assert {f"records/{run_id}.json" for run_id in NCM} | {f"manifests/{MANIFEST}.json", "PULL_REQUEST.md"} <= held.keys()
    facts = json.loads(held["submission.json"])
    assert facts["rows"][0]["records"] == list(NCM) and facts["rows"][0]["last_macro"] == pytest.approx(0.8687, abs=5e-5)


def test_verified_is_what_was_run_again(tmp_path):
    folder = copied(tmp_path, NCM[:2])
    made = gathered(folder, repeated=[Verdict(f"{NCM[0]}.json", "verified")])
    assert made.level(made.groups[0]) == "verified"
    made = gathered(folder, repeated=[Verdict(f"{JOINT[0]}.json", "verified")])
    assert made.level(made.groups[0]) == "self-reported", "another row's record was run again"
    group = Verdict("cil_digits ncm nano 17164cd6", "failed", ("a seed occurs twice: [0, 0]",))
    with pytest.raises(UserError, match="ncm nano 17164cd6 is not handed in: a seed occurs twice"):
        gathered(folder, repeated=[group])
    with pytest.raises(UserError, match=r"5535d0f9e11b7297.json is not handed in: other counts"):
        gathered(folder, repeated=[Verdict(f"{NCM[0]}.json", "failed", ("other counts",))])


def test_odd_records_are_flagged(tmp_path, known):
    def change(found, seed):
        found["git"]["dirty"] = seed == 0
        if seed == 2:
            found["finished"] = "2027-01-01T00:00:00+00:00"
        if seed == 4:
            found["seconds"]["total"] = 400.0

    folder = copied(tmp_path, [NCM[0], NCM[2], NCM[4]], change)
    (odd,) = gathered(folder, known).flags.values()
    assert odd[0] == "seeds 1, 3 are missing between those that are here" and odd[1] == "3 seeds; a card has 5"
    assert any(line.startswith("the code had changes") and line.endswith("(seed 0)") for line in odd)
    assert "it ended in the future (2027-01-01T00:00:00+00:00) (seed 2)" in odd
    assert "it counts 400 s of work between two moments 0 s apart (seed 4)" in odd
    (again,) = gathered(copied(tmp_path / "b", JOINT[:1]), known).flags.values()
    assert "this very record is known already (seed 0)" in again


def test_a_record_that_contradicts_itself_is_not_packed(tmp_path):
    def change(found, seed):
        found["rows" if "rows" in found else "correct"][0] = None

    folder = copied(tmp_path, NCM[:1], change)
    with pytest.raises(UserError):
        gathered(folder)
    (tmp_path / "nothing" / "records").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no finished record"):
        gathered(tmp_path / "nothing")


def row(mean, std, learner="mine", marks="", **other):
    made = {"scenario": "s", "manifest": "m", "model": "n", "learner": learner, "marks": marks, "seeds": "0 1 2 3 4"}
    return made | {"last_macro_mean": mean, "last_macro_std": std, "failed": 0, "dead": 0} | other


def test_numbers_above_the_bound_and_above_what_was_published():
    joint = row(0.90, 0.01, "joint", "reference")
    assert list(flags.of_row(row(0.91, 0.0), "", [joint], {})) == [], "within two standard deviations"
    assert list(flags.of_row(row(0.93, 0.0), "", [joint], {})) == ["93.00 % is above joint, the upper reference, with 90.00 %"]
    assert list(flags.of_row(row(0.93, 0.0), "", [row(0.9, 0.0, "joint", "reference", model="other")], {})) == []
    card = {"published": [{"last": 80.0, "protocol": "CIFAR-100 B0 Inc10"}, {"last": 99.0, "protocol": "CIFAR-10, CUB"}]}
    cards = {"cards": {"mine": card}}
    assert flags.published("mine", "cifar100", cards) == [80.0] and flags.published("mine", "cifar10", cards) == [99.0]
    assert list(flags.of_row(row(0.81, 0.0), "cifar100", [], cards)) == [
        "81.00 % is above every number published for mine on cifar100 (at most 80 %)"
    ]
    assert list(flags.of_row(row(0.79, 0.0), "cifar100", [], cards)) == []
    assert list(flags.of_row(row(0.5, 0.0, failed=2), "", [], {})) == ["2 runs of this setting have no result"]


def test_an_archive_is_what_was_packed(tmp_path):
    files = {"records/a.json": b"{}", "PULL_REQUEST.md": b"text"}
    archive.pack(files, tmp_path / "one.zip")
    archive.pack(dict(reversed(files.items())), tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    held = archive.unpack(tmp_path / "one.zip")
    assert held["records/a.json"] == b"{}" and archive.signature(held) is None
    for name, data, message in (
        ("records/a.json", b"[]", "its files are not those that checksums.txt lists"),
        ("../out.json", b"{}", "holds a file named '../out.json'"),
        ("/abs", b"{}", "holds a file named '/abs'"),
    ):
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as bad:
            for one, content in {**held, name: data}.items():
                bad.writestr(one, content)
        with pytest.raises(UserError, match=message):
            archive.unpack(tmp_path / "bad.zip")
    (tmp_path / "none.zip").write_bytes(b"not a zip")
    with pytest.raises(UserError, match="is no archive"):
        archive.unpack(tmp_path / "none.zip")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_signatures(tmp_path):
    for name in ("mine", "other"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(tmp_path / name)]
        subprocess.run(words, check=True)
    signers = tmp_path / "signers"
    signers.write_text("me@example.org " + (tmp_path / "mine.pub").read_text())
    archive.pack({"a.txt": b"a"}, tmp_path / "signed.zip", tmp_path / "mine")
    held = archive.unpack(tmp_path / "signed.zip")
    anybody, me = archive.signature(held), archive.signature(held, signers)
    assert anybody and me and anybody.key == me.key and anybody.name is None and me.name == "me@example.org"
    with pytest.raises(UserError, match="does not fit its files"):
        archive.signature({**held, archive.SUMS: archive.checksums({"a.txt": b"b"})})
    signers.write_text("you@example.org " + (tmp_path / "other.pub").read_text())
    with pytest.raises(UserError, match=r"by a key that .* does not list"):
        archive.signature(held, signers)
    with pytest.raises(UserError, match="no such key"):
        archive.sign(b"", tmp_path / "nothing")


def test_the_badge_is_svg_and_escapes():
    made = ElementTree.fromstring(badge.svg("clbench <x>", 'a & "b" 93.6 %', "verified"))
    texts = [one.text for one in made.iter() if one.tag.endswith("}text")]
    assert (
        texts == ["clbench <x>", 'a & "b" 93.6 %, verified']
        and made.get("aria-label") == 'clbench <x>: a & "b" 93.6 %, verified'
    )
    assert badge.COLOURS["verified"] in badge.svg("a", "b", "verified")


def test_parquet_holds_every_record_and_says_what_its_columns_mean(tmp_path, known):
    reader = pytest.importorskip("pyarrow.parquet")
    folder = copied(tmp_path / "r", [*NCM, *JOINT])
    made = parquet.rows(folder)
    parquet.write(made, tmp_path / "out" / "all.parquet")
    import pandas as pd

    table = pd.read_parquet(tmp_path / "out" / "all.parquet")
    assert sorted(table.run_id) == sorted((*NCM, *JOINT)) and set(table.columns[: len(parquet.COLUMNS)]) == set(parquet.COLUMNS)
    assert table.groupby("learner").last_macro.mean()["ncm"] == pytest.approx(0.8687, abs=5e-5)
    one = json.loads((folder / "records" / f"{NCM[1]}.json").read_text())
    (line,) = [row for row in table.to_dict("records") if row["run_id"] == NCM[1]]
    assert json.loads(line["config"]) == one["config"] and line["manifest"] == MANIFEST and line["seed"] == 1
    assert line["checksum"] == one["checksum"] and line["revision"] == one["git"]["revision"] and not line["dirty"]
    schema = reader.read_schema(tmp_path / "out" / "all.parquet")
    assert schema.metadata[b"clbench"] == parquet.FORM.encode()
    assert all(schema.field(name).metadata[b"about"] for name in schema.names)
    for name, (kind, _) in parquet.COLUMNS.items():
        assert str(schema.field(name).type) == {"float64": "double"}.get(kind, kind), name


def groups_of(folder):
    found = scan(folder)
    return rank(found.runs, ACCURACY, found.dead)


def test_every_eval_ever_there_and_back(tmp_path):
    folder = copied(tmp_path / "r", [*NCM, *JOINT])
    groups = groups_of(folder)
    files = every_eval.write(groups, tmp_path / "out", "me", 1_790_000_000)
    assert len(files) == 2 and files[0].parent.parent.name == "clbench"
    table = every_eval.read([tmp_path / "out"])
    means = {(row["model"], row["evaluation"]): row for row in table.rows}
    for group in groups:
        name = "clbench/" + "-".join(group.row[key] for key in ("learner", "model", "variant"))
        one = means[name, "cil_digits: last_macro"]
        assert (
            one["score"] == group.row["last_macro_mean"] and one["deviation"] == group.row["last_macro_std"] and one["n"] == 5
        )
        assert one["better"] == "higher" and means[name, "cil_digits: forgetting"]["better"] == "lower"
        assert one["source"] == "me"


STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
FORM = {  # what the form's own schema (0.2.1) demands of the parts that are written here, in short
    "type": "object",
    "additionalProperties": False,
    "required": [*every_eval._NEEDED, "evaluation_results"],
    "properties": {
        **{key: {"type": "string"} for key in ("schema_version", "evaluation_id", "retrieved_timestamp")},
        "source_metadata": {
            "type": "object",
            "required": ["source_type", "source_organization_name", "evaluator_relationship"],
            "properties": {"source_type": {"enum": ["documentation", "evaluation_run"]}, "additional_details": STRINGS},
        },
        "eval_library": {"type": "object", "required": ["name", "version"]},
        "model_info": {"type": "object", "required": ["name", "id"], "properties": {"additional_details": STRINGS}},
        "evaluation_results": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["evaluation_name", "source_data", "metric_config", "score_details"],
                "properties": {
                    "source_data": {
                        "required": ["dataset_name", "source_type"],
                        "properties": {"source_type": {"const": "other"}},
                    },
                    "metric_config": {
                        "required": ["lower_is_better", "score_type", "min_score", "max_score"],
                        "properties": {"score_type": {"const": "continuous"}, "additional_details": STRINGS},
                    },
                    "score_details": {"required": ["score"], "properties": {"score": {"type": "number"}}},
                },
            },
        },
    },
}


def test_what_is_written_has_the_form(tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    for group in groups_of(copied(tmp_path, [*NCM[:1], *JOINT])):
        made = every_eval.document(group, "me", 1_790_000_000)
        jsonschema.validate(made, FORM)
        for one in made["evaluation_results"]:
            limits = one["metric_config"]
            assert limits["min_score"] <= one["score_details"]["score"] <= limits["max_score"]
            assert ("uncertainty" in one["score_details"]) == (group.row["n_seeds"] > 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_info": None}, "model_info is missing"),
        ({"evaluation_results": [{}]}, "KeyError: 'score_details'"),
        ({"evaluation_results": [{"score_details": {"score": "high"}}]}, "score must be a finite number, got 'high'"),
    ],
)
def test_other_files_are_named(tmp_path, change, message):
    good = {key: {} for key in (*every_eval._NEEDED, "evaluation_results")} | change
    path = tmp_path / "x.json"
    path.write_text(json.dumps({key: value for key, value in good.items() if value is not None}))
    with pytest.raises(UserError, match=message):
        every_eval.read([path])
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        every_eval.read([path])


def test_the_commands(clbench):
    copied(clbench.folder / "mine", NCM[:2])
    said = clbench("submit", "mine", "--out", "sent.zip").stdout
    assert "2 seeds; a card has 5" in said and "written sent.zip: 1 badges, 1 manifests, 2 records;" in said
    checked = clbench("submit", "--check", "sent.zip").stdout
    assert "2 records; 0 failed; not signed" in checked and "self-reported" in checked
    assert "has no folder records" in clbench("submit", "nowhere", code=2).stderr
    assert "stands alone" in clbench("submit", "mine", "--check", "sent.zip", code=2).stderr
    assert "written all.parquet: 2 records" in clbench("report", "--results-dir", "mine", "--out", "all.parquet").stdout
    words = ("report", "--results-dir", "mine", "--format", "every-eval-ever")
    assert "needs --out FOLDER" in clbench(*words, code=2).stderr
    assert "written 1 files under eee" in clbench(*words, "--out", "eee", "--organization", "me").stdout
    assert "cil_digits: last_macro" in clbench("report", "external", "eee").stdout


def test_clocks():
    entry = {"numbers_version": 1, "config": {}, "git": None, "created": "2026-11-01T00:00:00", "finished": None}
    assert "it does not say when it ran" in list(flags.of_record(entry, NOW))
    late = entry | {"finished": (NOW + timedelta(minutes=5)).isoformat()}
    assert list(flags.of_record(late, NOW)) == ["no revision of the code is known"], "clocks differ by minutes"
    early = entry | {"finished": "2026-10-31T00:00:00+00:00", "git": {"revision": "a", "dirty": False}}
    assert list(flags.of_record(early, NOW)) == ["it ended before it began"]
