"""Figures: every kind in every format, the same bytes again, hostile names, many learners, gaps; and README's picture."""

import copy
import json
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from clbench.evaluation import metrics
from clbench.interfaces import UserError
from clbench.records import record
from clbench.report.runs import Filter

pytest.importorskip("altair")
pytest.importorskip("vl_convert")
from clbench.report.figures import board, data, grids, plots, runs

ROOT = pathlib.Path(__file__).resolve().parent.parent
ALWAYS = ("leaderboard", "overview", "matrix", "curves", "forgetting", "cost")
HOSTILE = (
    "$\\frac{a",
    "<script>alert(1)</script>",
    "=cmd|' /C calc'!A0",
    "naïve 😀 名前",
    "$x$ & $y$",
    "\u202eabc\n",
    "x" * 300,
    "-",
)


@pytest.fixture(scope="session")
def entry() -> dict:
    """A finished record of slca on digits."""
    for path in sorted((ROOT / "results" / "records").glob("*.json")):
        found = json.loads(path.read_text())
        if (found["scenario"]["name"], found["learner"]["name"], found["status"]) == ("cil_digits", "slca", "ok"):
            return found
    pytest.skip("no committed record of slca on cil_digits")


def folder(tmp_path, entry, names=("slca",), seeds=(0, 1, 2), **changes) -> pathlib.Path:
    """A results folder with a run of every name on every seed; each learner is a little worse than the one before it."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(names):
        for seed in seeds:
            made = copy.deepcopy(entry) | {"seed": seed, "run_id": f"{i:08x}{seed:08x}"} | copy.deepcopy(changes)
            made["learner"]["name"], made["config"]["seed"], made["config"]["nth"] = name, seed, i
            made["seconds"]["total"], made["stored_bytes"] = 1.0 + 7 * i, 10_000 * (i + 1)
            for key in ("correct", "correct_masked", "correct_top5"):
                if key in made:
                    made[key] = [[None if c is None else max(0, c - i - int(rng.integers(3))) for c in r] for r in made[key]]
            record.write(made, tmp_path / "results" / "records")
    return tmp_path / "results"


@pytest.mark.parametrize("form", plots.FORMS)
def test_every_kind_is_drawn_twice_the_same(tmp_path, entry, form):
    results = folder(tmp_path, entry, ("a", "b"))
    first = plots.write(results, tmp_path / "one", (), form)
    kinds = {path.name.split("-")[0] for path in first}
    assert kinds == {*ALWAYS, "profiles", "seconds"} and all(path.suffix == f".{form}" for path in first)
    again = plots.write(results, tmp_path / "two", (), form) if form != "pdf" else first  # PDF: random names of fonts
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]
    assert not list((tmp_path / "one").glob(".*"))
    head = first[0].read_bytes()[:5]
    assert head == {"png": b"\x89PNG\r", "svg": b"<?xml", "pdf": b"%PDF-"}[form]


def texts(path: pathlib.Path) -> list[str]:
    return ["".join(node.itertext()) for node in ET.parse(path).getroot().iter("{http://www.w3.org/2000/svg}text")]


def test_hostile_names_are_text_and_nothing_else(tmp_path, entry):
    scenario = copy.deepcopy(entry["scenario"]) | {
        "name": "$e_m}<b>",
        "eval_names": ["$\\sum", "<b>", "a long name indeed", "😀", "=1"],
    }
    results = folder(tmp_path, entry, HOSTILE, (0,), scenario=scenario)
    for path in plots.write(results, tmp_path / "out", (), "svg"):
        assert re.fullmatch(r"[a-z0-9_.-]+", path.name)
        shown = texts(path)
        if path.name.startswith("leaderboard"):
            for name in ("$\\frac{a", "<script>alert(1)</script>", "naïve 😀 名前", "$x$ & $y$", "-"):
                assert name in shown
            assert max(map(len, shown)) < 80
        root = ET.parse(path).getroot()
        assert not [n for n in root.iter() if n.tag.endswith(("script", "foreignObject", "}a"))]
        hrefs = [v for n in root.iter() for k, v in n.attrib.items() if k.endswith("href")]
        assert all(v.startswith(("#", "data:image/png")) for v in hrefs)
    assert plots.write(results, tmp_path / "out", ("leaderboard", "matrix"), "pdf")


def sizes(path: pathlib.Path) -> set[float]:
    """Sizes of type in points."""
    return {float(size) for size in re.findall(r'font-size="([\d.]+)px"', path.read_text())}


def test_paper_size_and_readable_type(tmp_path, entry):
    results = folder(tmp_path, entry, [f"learner_{i}" for i in range(34)], (0, 1))
    for path in plots.write(results, tmp_path / "out", ALWAYS, "svg"):
        root = ET.parse(path).getroot()
        wide, high = (float(root.attrib[k]) / 72 for k in ("width", "height"))
        assert (3.25 < wide < 3.35 or 5.9 < wide < 7.2) and high < 11, path.name
        assert sizes(path) and min(sizes(path)) >= 7
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert len([name for name in names if name.startswith("matrix")]) == 2  # 30 to a page


def test_names_in_the_cost_figure_cover_nothing(tmp_path, entry):
    (field,) = data.read(folder(tmp_path, entry, [f"a_long_name_of_learner_{i}" for i in range(28)], (0,)))
    rows = board.cost_rows(field.lines, "cost_seconds", (210, 220))
    assert len(rows) == 28 and 3 < sum("name" in row for row in rows) < 28
    spans = [np.log([r["cost"] for r in rows]), np.array([r["accuracy"] for r in rows])]
    scale = [(size - pad) / (v.max() - v.min()) for v, size, pad in zip(spans, (210, 220), (28, 20), strict=True)]
    places = [(scale[0] * np.log(r["name_x"]), scale[1] * r["name_y"], len(r["name"])) for r in rows if "name" in r]
    boxes = [(x, y - 4, x + 4.3 * n, y + 4) for x, y, n in places]
    for i, a in enumerate(boxes):
        assert not any(a[0] < b[2] - 0.1 and b[0] < a[2] - 0.1 and a[1] < b[3] - 0.1 and b[1] < a[3] - 0.1 for b in boxes[:i])


def test_one_definition_for_paper_and_page(tmp_path, entry):
    """What a page draws is the chart that paper draws, without the data."""
    from clbench.report.page import pictures

    specs = pictures.specifications()
    (field,) = data.read(folder(tmp_path, entry, ("a", "b")))
    charts = {"leaderboard": board.leaderboard, "forgetting": board.forgetting, "curves": runs.curves, "seconds": board.seconds}
    for name, make in charts.items():
        ((_, paper),) = make([field])
        assert json.dumps(paper["layer"]) == json.dumps(specs[name]["layer"]), name
        assert not specs[name].get("datasets") and paper["datasets"]["table"]


def test_numbers_unfold_to_tidy_rows():
    values = {"x": [[1, 2], [3]], "y": [[5, None], [6]], "seed_only": [7, 8]}
    assert grids.unfold("loss", values, seeds=["a", "b"]) == [
        {"seed": "a", "x": 1, "y": 5, "seed_only": 7},
        {"seed": "a", "x": 2, "y": None, "seed_only": 7},
        {"seed": "b", "x": 3, "y": 6, "seed_only": 8},
    ]
    assert grids.plain([[1.23456789, np.nan], [np.inf, 3.0]]) == [[1.2346, None], [None, 3]]
    a = np.array([[0.9, np.nan, np.nan], [0.5, 0.8, np.nan], [0.7, 0.6, 1.0]])
    assert grids.forgotten([a], [0, 1, 2]) == {"lost": [[20, 20, None]]}
    assert grids.curve([a], [0, 1, 2]) == {"accuracy": [[90, 65, 76.67]]}


def test_the_numbers_are_those_of_the_records(tmp_path, entry):
    results = folder(tmp_path, entry, ("a", "b"))
    (field,) = data.read(results)
    assert [line.label for line in field.lines] == ["a", "b"]
    own = [metrics.summary(e) for e in record.read_all(results / "records")[0] if e["learner"]["name"] == "a"]
    assert field.lines[0].last == pytest.approx(np.mean([v["last_macro"] for v in own]))
    assert data.steps(field.lines[0]).mean() == pytest.approx(np.mean([v["step_macro"] for v in own]), abs=1e-6)
    assert np.nanmean(data.forgotten(field.lines[0])) == pytest.approx(np.mean([v["forgetting"] for v in own]), abs=1e-6)
    shown = texts(plots.write(results, tmp_path / "out", ("leaderboard",), "svg")[0])
    assert f"{100 * field.lines[0].last:.1f}" in shown


def test_rows_with_one_name_are_told_apart_and_marks_are_said(tmp_path, entry):
    folder(tmp_path, entry, ("same", "same"), (0,))
    path = tmp_path / "results" / "records" / "0000000200000000.json"
    made = copy.deepcopy(entry) | {"run_id": path.stem, "marks": ["test_tuned"]}
    made["learner"]["name"] = "cheat"
    record.write(made, path.parent)
    (field,) = data.read(tmp_path / "results")
    labels = [line.label for line in field.lines]
    assert "cheat (test-tuned)" in labels and len(set(labels)) == 3
    assert sum(bool(re.fullmatch(r"same [0-9a-f]{8}", label)) for label in labels) == 2


def test_curves_and_traces_are_drawn_where_records_have_them(tmp_path, entry):
    steps = list(range(40))
    curves = {"step": steps, "loss": [1 / (k + 1) for k in steps[:-1]] + [None], "lr": [0.1] * 40, "boundaries": [8, 16]}
    trace = [
        {"experience": e, "correct": [n - k if j <= e else None for j, n in enumerate(entry["n"])], "n": entry["n"]}
        for e in range(5)
        for k in (3, 1)
    ]
    results = folder(tmp_path, entry, ("a",), curves=curves, stability={"trace": trace})
    (loss,) = plots.write(results, tmp_path / "out", ("loss",), "svg")
    assert {"loss", "learning rate", "step", "seed 0", "seed 2"} <= set(texts(loss))
    (stability,) = plots.write(results, tmp_path / "out", ("stability",), "svg")
    assert "evaluation inside experiences" in texts(stability)


@pytest.mark.parametrize(
    "curves", [7, {}, {"step": [1]}, {"step": [1], "loss": ["x"]}, {"tokens": [], "loss": []}, {"step": [1, 2], "loss": [1]}]
)
def test_malformed_curves_are_no_curves(tmp_path, entry, curves):
    results = folder(tmp_path, entry, ("a",), (0,), curves=curves)
    plots.write(results, tmp_path / "out", (), "svg")
    with pytest.raises(UserError, match="nothing to draw for loss"):
        plots.write(results, tmp_path / "out", ("loss",), "svg")


def test_one_experience_has_nothing_to_forget(tmp_path, entry):
    one = {key: [entry[key][0][:1]] for key in ("correct", "correct_masked", "correct_top5")}
    results = folder(
        tmp_path,
        entry,
        ("a",),
        (0,),
        n=entry["n"][:1],
        first_seen=[0],
        eval_classes=entry["eval_classes"][:1],
        class_n=entry["class_n"][:1],
        scenario=entry["scenario"] | {"eval_names": ["x"]},
        calibration=None,
        task_confusion=None,
        **one,
    )
    made = plots.write(results, tmp_path / "out", (), "png")
    assert "forgetting" not in {path.name.split("-")[0] for path in made}
    with pytest.raises(UserError, match="nothing to draw for forgetting: no record has an old set"):
        plots.write(results, tmp_path / "out", ("forgetting",), "png")


@pytest.mark.parametrize(
    ("kinds", "form", "message"),
    [
        (("leaderbord",), "svg", "no figure 'leaderbord'; did you mean 'leaderboard'?"),
        ((), "sgv", "no format 'sgv'; did you mean 'svg'?"),
    ],
)
def test_mistakes(tmp_path, kinds, form, message):
    with pytest.raises(UserError) as caught:
        plots.write(tmp_path, tmp_path, kinds, form)
    assert message in str(caught.value)


def test_nothing_to_draw(tmp_path, entry):
    with pytest.raises(UserError, match="no finished run in"):
        plots.write(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="no learner 'slac'"):
        plots.write(folder(tmp_path, entry), tmp_path / "out", (), "svg", Filter(learner=["slac"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["altair", "vl_convert"])
def test_without_the_libraries_the_extra_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install 'clbench\[report\]'"):
        plots.write(tmp_path, tmp_path)


def test_no_display_no_global_state_no_torch(tmp_path, entry):
    results = folder(tmp_path, entry)
    code = (
        "import sys, pathlib; from clbench.report.figures import plots; "
        f"plots.write(pathlib.Path({str(results)!r}), pathlib.Path({str(tmp_path / 'out')!r}), ['overview'], 'svg'); "
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-W", "error", "-c", code], cwd=ROOT, env={"PATH": "", "HOME": str(tmp_path)}
        ).returncode
        == 0
    )


def test_labels_are_spread_in_their_order():
    where = board._spread([5.0, 5.1, 0.0, 5.05], 1.0)
    order = np.argsort([5.0, 5.1, 0.0, 5.05])
    assert (np.diff(np.array(where)[order]) >= 1 - 1e-6).all() and where[2] == 0


def test_readme_shows_what_its_command_makes(tmp_path):
    """The committed picture is what the command under it makes of the committed records, with the same libraries."""

    readme = (ROOT / "README.md").read_text()
    found = re.search(r"!\[[^\]]*\]\((results/plots/(\w+)-[^)]*\.svg)\)", readme)
    if not found:
        pytest.skip("README.md shows no picture of results/plots")
    shown = (ROOT / found[1]).read_text()
    command = re.search(r"clbench report plot (\w+) --scenario (\S+) --where (\S+) --format svg --out results/plots", readme)
    assert command and command[1] == found[2], "the command under the picture is missing"
    if f"<!-- {plots.creator()} -->" not in shown:
        pytest.skip("the picture was made with other versions of the libraries")
    wanted = Filter(scenario=[command[2]], where=[command[3]])
    first, *more = made = plots.write(ROOT / "results", tmp_path, [command[1]], "svg", wanted)
    assert first.name == pathlib.Path(found[1]).name and all(f"(results/plots/{one.name})" in readme for one in more)
    assert [one.read_text() for one in made] == [(ROOT / "results" / "plots" / one.name).read_text() for one in made]
