"""The page: what is written (no browser needed), and what Chromium makes of it (skipped where there is none)."""

import base64
import csv
import hashlib
import io
import json
import pathlib
import re
import shlex
import time
import xml.etree.ElementTree as ET

import pytest
from browser import Browser, find

from clbench.evaluation import metrics
from clbench.interfaces import UserError
from clbench.records import record
from clbench.report import cards
from clbench.report.page import contents, detail, html
from clbench.report.runs import summarize
from clbench.report.table import rows

RESULTS = pathlib.Path(__file__).resolve().parent.parent / "results"
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "<!--",
    "a\"b'c`d",
    "=cmd|' /C calc'!A0",
    "🦊🦊",
    "abc\u202edef\u2066",
    "long" * 200,
    "a,b;c",
    "&lt;b&gt; ${x} {{data}}",
    "\ud800 half",
    "line\nbreak\ttab\0nul",
)


def entry(learner="ncm", seed=0, scenario="cil", correct=((8, None), (6, 9)), n=10, **changes):
    """A record of experiences with a set each; the learner is part of the identity."""
    sets = len(correct[0])
    config = {"seed": seed, "learner": {"name": learner, "lr": changes.pop("lr", 0.1)}, "scenario": {"name": scenario}}
    made = {
        "schema": 1,
        "run_id": record.run_id(config, "m" * 64, "w" * 64, None),
        "status": "ok",
        "numbers_version": record.NUMBERS_VERSION,
        "config": config,
        "scenario": {"name": scenario, "manifest_sha256": "m" * 64},
        "learner": {"name": learner, "plugin": None},
        "model": {"name": "nano", "state_sha256": "w" * 64},
        "seed": seed,
        "n": [n] * sets,
        "first_seen": list(range(sets)),
        "correct": [list(row) for row in correct],
        "seconds": {"total": 1.5, "learn": 1.0},
        "error": None,
    }
    made = made | changes
    assert record.fault(made) is None
    return made


def stair(size, top=90, n=100):
    """Counts that fall as experiences pass."""
    return [[max(0, top - 3 * (i - j)) if j <= i else None for j in range(size)] for i in range(size)]


def fill(folder, entries):
    """Records as files, without the locks and syncs of `record.write`."""
    (folder / "records").mkdir(exist_ok=True)
    for made in entries:
        (folder / "records" / f"{made['run_id']}.json").write_text(json.dumps(made))
    return folder


def written(folder):
    """The page of a folder, and the data in it."""
    text = html.write(folder).read_text(encoding="ascii")
    return text, json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1], parse_constant=pytest.fail
    )


@pytest.fixture(scope="module")
def collected():
    """The data of the committed results."""
    return contents.collect(RESULTS)


def learners(data):
    return [line[1] for line in data["lines"]]


# --- without a browser ------------------------------------------------------------------------------------------------


def test_committed_results_fit_and_repeat(tmp_path):
    paths = [html.write(RESULTS, tmp_path / name) for name in ("a.html", "b.html")]
    first, second = (path.read_bytes() for path in paths)
    assert first == second and len(first) < 3_000_000 and first.isascii()


def test_policy_names_the_script_and_the_style(tmp_path):
    text, _ = written(fill(tmp_path, [entry()]))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "*" not in policy
    (style,), scripts = (re.findall(f"<{tag}>(.*?)</{tag}>", text, re.S) for tag in ("style", "script"))
    digests = [base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in (style, *scripts)]
    assert len(scripts) == 2 and f"style-src 'sha256-{digests[0]}'" in policy
    assert f"script-src 'sha256-{digests[1]}' 'sha256-{digests[2]}';" in policy
    assert scripts[0] == html.bundle() and text.count("vegaEmbed=") == 1  # Vega comes once, not with every figure
    text = text.replace(scripts[0], "")
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", text) and "@import" not in text and "url(" not in text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text)
    assert " style=" not in text and not re.search(r"<[a-z][^>]* on[a-z]+=", text.split('<script type="application/json"')[0])


def test_hostile_names_stay_data(tmp_path):
    text, data = written(fill(tmp_path, [entry(name, scenario=HOSTILE[i - 1]) for i, name in enumerate(HOSTILE)]))
    assert len(data["lines"]) == len(HOSTILE)
    inside = re.search(r'id="data">(.*?)</script>', text, re.S)[1]
    assert not set("<>&") & set(inside) and text.count("</script>") == 3
    plain = text[: text.index('id="data">')]
    assert "<script>alert" not in plain and "<img" not in plain
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in plain and "&lt;/script&gt;&lt;img src=x" in plain
    assert "<script>alert(1)</script>" in learners(data) and "🦊🦊" in learners(data)
    assert all("\u202e" not in name and "\0" not in name and len(name) <= 300 for name in learners(data))
    shown = dict(zip(learners(data), data["commands"], strict=True))
    assert shown["abc\ufffddef\ufffd"] == "" and "'learner==cmd|'" in shown["=cmd|' /C calc'!A0"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none(tmp_path, value):
    made = entry(seconds={"total": value}, peak_memory_bytes=value)
    made["config"]["learner"]["lr"] = value
    _, data = written(fill(tmp_path, [made]))
    assert data["columns"].get("seconds_mean") is None


def test_numbers_are_those_of_the_leaderboard(tmp_path):
    runs = [entry("a", s, correct=c) for s, c in enumerate((((8, None), (6, 9)), ((9, None), (7, 10)), ((10, None), (9, 9))))]
    _, data = written(fill(tmp_path, [*runs, entry("b", 0)]))
    board = rows([*runs, entry("b", 0)])
    assert learners(data) == [row["learner"] for row in board] == ["a", "b"]
    for name in ("last_macro_mean", "last_macro_low", "last_macro_high", "forgetting_mean"):
        assert data["columns"][name] == [contents.number(row[name]) for row in board]
    assert [run[0] for run in data["runs"][0]] == [0, 1, 2] and data["runs"][0][0][2] == 0.75
    assert data["details"][0]["seeds"] == [0, 1, 2] and data["details"][0]["curve"] == [
        {"accuracy": [[80, 75], [90, 85], [100, 90]]}
    ]
    assert data["details"][0]["matrix"] == [{"accuracy": [[90, None], [73.33, 93.33]]}]
    assert data["details"][0]["forgotten"] == [{"lost": [[20, None], [20, None], [10, None]]}]
    place = data["names"].index("forgetting")
    assert data["details"][1]["v"][place] == [0.2, None]
    assert data["links"] and data["counts"] == {"ok": 4}


def test_optional_parts_of_any_shape(tmp_path):
    good = {"tokens": list(range(1000)), "loss": [2.0] * 1000, "lr": [0.1] * 1000, "boundaries": [500]}
    good["loss"][333] = 9.0
    trace = {"trace": [{"experience": 1, "correct": [5, None], "n": [10, 10]}] * 500}
    parts = [
        {"curves": good, "stability": trace},
        {"curves": {"step": [0, 1], "loss": [1.0]}, "stability": {"trace": []}},
        {"curves": 5, "stability": {}, "sum_loss": "x"},
        {"curves": {"step": [0, 1], "loss": ["<b>", None]}, "stability": None},
        {"curves": {"step": [], "loss": []}},
        {"curves": {"step": [0, 1], "loss": [float("nan"), 1e999], "lr": [1]}},
        {},
    ]
    made = [entry(f"l{i}", **part) for i, part in enumerate(parts)]
    made[-1]["scenario"] |= {"experiences": [{"classes": []}, {}], "class_order": None, "kind": None}
    _, data = written(fill(tmp_path, made))
    found = dict(zip(learners(data), data["details"], strict=True))
    curve, edges, _, words = found["l0"]["loss"]
    assert len(curve["x"][0]) <= detail.POINTS + 2 and 9 in curve["loss"][0] and edges == [500] and words["unit"] == "tokens"
    trace = found["l0"]["stability"][0]
    assert len(trace["accuracy"]) == detail.STEPS and trace["accuracy"][0] == [50, None] and trace["experience"][0] == 2
    assert not any({"loss", "stability"} & found[f"l{i}"].keys() for i in range(1, 7))


def test_empty_missing_and_foreign(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        html.write(tmp_path / "none")
    _, data = written(tmp_path)
    assert data["lines"] == [] and data["problems"] == []
    fill(tmp_path, [entry(), entry("bad", status="failed", correct=((1,),), error={"type": "E", "message": "<b>"})])
    folder = tmp_path / "records"
    whole = (folder / f"{entry()['run_id']}.json").read_text()
    (folder / "half.json").write_text(whole[: len(whole) // 2])
    (folder / "zero.json").write_bytes(b"")
    (folder / "bytes.json").write_bytes(b"\xff\xfe\0\1")
    (folder / "list.json").write_text("[1]")
    (folder / "other.json").write_text(whole)
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "notes.txt").write_text("hello")
    (folder / "folder.json").mkdir()
    _, data = written(tmp_path)
    assert data["num_problems"] == len(data["problems"]) == 7 and data["counts"] == {"failed": 1, "ok": 1}
    assert [line[0] for line in data["lost"]] == ["failed"] and sorted(learners(data)) == ["bad", "ncm"]
    with pytest.raises(UserError, match="is a folder"):
        html.write(tmp_path, folder)
    elsewhere = html.write(tmp_path, tmp_path / "deep" / "page.html")
    assert '"links":false' in elsewhere.read_text()


def test_rows_of_one_learner_say_how_they_differ(tmp_path):
    _, data = written(fill(tmp_path, [entry(lr=0.1), entry(lr=0.5), entry("other")]))
    assert sorted(zip(learners(data), data["differs"], strict=True)) == [("ncm", "lr=0.1"), ("ncm", "lr=0.5"), ("other", "")]


def test_commands_are_those_of_the_cards(collected):
    data = collected
    found, _ = record.read_all(RESULTS / "records")
    for key, seeds, command in zip(data["keys"], (line[6] for line in data["lines"]), data["commands"], strict=True):
        first = next(e for e in found if summarize(e).variant == key)
        assert command == cards.command(first, seeds.split(), RESULTS.parent / "conf")
        assert command.startswith("clbench run ") and command.endswith(f"seed={','.join(seeds.split())}")


def test_commands_make_the_runs_of_their_rows(collected):
    from clbench.config import compose
    from clbench.interfaces import declared
    from clbench.run import provenance

    def identity(job):
        return provenance.identity(job, declared(compose.load_target(job["learner"]["_target_"]), job["learner"]))

    data, found = collected, record.read_all(RESULTS / "records")[0]
    for key, command in list(zip(data["keys"], data["commands"], strict=True))[3::7]:
        words = shlex.split(command)[2:]
        jobs = compose.read([word for word in words if word != "-m"], "-m" in words).jobs
        wanted = [e["config"] for e in found if summarize(e).variant == key]
        made = [identity(job) for job in jobs]
        assert len(wanted) == len(made) and all(one in made for one in wanted), command


def test_details_give_way_to_the_size():
    texts = [["x" * size, "y" * (size // 4), "w" * (size // 5), "z" * (size // 20), "null"] for size in (400, 4000, 40_000)]
    made = [[json.dumps(t) if t != "null" else t for t in row] for row in texts]
    kept, left = detail.fit(made, room=10_000)
    assert left == [2, 0, 0, 1, 0] and kept[0] == texts[0][0] and kept[2] == texts[2][3]
    assert detail.fit(made, room=10**6)[1] == [3, 0, 0, 0, 0]
    assert detail.fit(made, room=5)[1] == [0, 0, 0, 0, 3]
    assert detail.fit([], room=5) == ([], [0, 0, 0, 0, 0])


def test_size_is_bounded_where_matrices_are_large(tmp_path):
    big = [entry(f"l{i}", correct=stair(80), n=100) for i in range(300)]
    text, data = written(fill(tmp_path, [*big, entry("small")]))
    assert len(text) < 3_000_000 and sum(data["left"][1:]) > 0
    assert "all" in data["details"][learners(data).index("small")]  # the largest rows give way, not all
    assert all(detail is not None for detail in data["details"])


# --- in Chromium ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    program = find()
    if program is None:
        pytest.skip("no Chromium: install it (Debian: apt-get install chromium) or name it in CHROMIUM")
    running = Browser(program)
    try:
        running.send("Browser.getVersion")
    except (RuntimeError, TimeoutError, OSError) as error:
        running.stop()
        pytest.skip(f"{program} does not start: {error}")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def committed(tmp_path_factory, collected):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html.page(collected), encoding="ascii")
    return path


@pytest.fixture
def open_page(browser):
    tabs = []

    def open_it(path, fragment="", **options):
        tabs.append(browser.tab(**options))
        tabs[-1].open(path, fragment)
        return tabs[-1]

    yield open_it
    for tab in tabs:
        assert tab.troubles() == [] and tab.asked() == []
        tab.close()


NAMES = "[...document.querySelectorAll('#table tbody tr:not(.group) th.name a')].map((a) => a.textContent)"


def keys_of(tab):
    """Learner -> the name of its row in the fragment."""
    keys = tab("[...document.querySelectorAll('#table tr[data-key]')].map((r) => r.dataset.key)")
    return dict(zip(tab(NAMES), keys, strict=True))


def ungroup(tab):
    tab("document.querySelector('#board-tools input').click()")


def wait(tab, condition, seconds=30):
    """Until an expression in the page is true."""
    stop = time.monotonic() + seconds
    while not tab(condition):
        assert time.monotonic() < stop, condition
        time.sleep(0.05)


def drawn(tab, where):
    """Wait until Vega has drawn the figures of a part of the page -> the texts in each."""
    tab.frame()
    wait(
        tab,
        f"[...document.querySelectorAll('{where} figure')].every((f) => f.dataset.drawn || f.querySelector('.picture > p'))",
    )
    words = "[...f.querySelectorAll('svg text')].map((t) => t.textContent).join(' ')"
    return tab(f"[...document.querySelectorAll('{where} figure')].map((f) => {words})")


def column(tab, name):
    place = f"[...document.querySelectorAll('#table thead button')].findIndex((b) => b.dataset.column === '{name}')"
    lines = "[...document.querySelectorAll('#table tbody tr:not(.group)')]"
    return tab(f"(() => {{ const k = {place}; return {lines}.map((r) => r.children[k].textContent); }})()")


def click_head(tab, name, shift=False):
    event = f"new MouseEvent('click', {{ bubbles: true, shiftKey: {str(shift).lower()} }})"
    tab(f"document.querySelector('#table button[data-column={name}]').dispatchEvent({event})")


def test_sorting(tmp_path, open_page):
    folder = fill(tmp_path, [entry("b", 0, correct=((8, None), (5, 9))), entry("c", 0, correct=((9, None), (9, 9)))])
    fill(folder, [entry("a", 0, correct=((8, None), (5, 9))), entry("d", 0, status="failed", error={"type": "E"})])
    tab = open_page(html.write(folder))
    ungroup(tab)
    assert tab(NAMES) == ["c", "a", "b", "d"]
    click_head(tab, "last")
    assert tab(NAMES) == ["a", "b", "c", "d"]  # no value stays last
    head = "document.querySelector('#table button[data-column={}]').closest('th').getAttribute('aria-sort')"
    assert tab(head.format("last")) == "ascending" and tab(head.format("learner")) is None
    click_head(tab, "learner", shift=True)
    click_head(tab, "learner", shift=True)
    assert tab(NAMES) == ["b", "a", "c", "d"] and "then Learner" in tab("document.getElementById('said').textContent")
    tab("document.querySelector('#table button[data-column=learner]').focus()")
    tab.key("Enter")  # from the keyboard; the focus stays where it was
    assert tab(NAMES) == ["a", "b", "c", "d"] and tab("document.activeElement.dataset.column") == "learner"


def test_filters(committed, open_page):
    tab = open_page(committed)
    total, said = len(tab(NAMES)), "document.getElementById('board-count').textContent"
    every = tab(said)
    assert total > 5

    def put(name, value):
        target = f"document.getElementById('filters').elements['{name}']"
        what = "checked" if isinstance(value, bool) else "value"
        tab(f"{target}.{what} = {json.dumps(value)}; {target}.dispatchEvent(new Event('input', {{ bubbles: true }}))")

    put("learner", "slca")
    assert set(tab(NAMES)) == {"slca"} and " of " in tab("document.getElementById('board-count').textContent")
    put("learner", "")
    put("text", "BACKBONE_lr replay")
    assert set(tab(NAMES)) == {"replay"}
    put("text", "nothing like it")
    assert tab(NAMES) == [] and "No row" in tab("document.getElementById('board-more').textContent")
    tab("document.querySelector('#board-more button').click()")
    assert len(tab(NAMES)) == total
    put("references", True)
    assert "joint" not in tab(NAMES) and " of " in tab(said) and tab(said) != every  # the table itself shows 200 at most
    put("model", "vit_tiny")
    assert set(column(tab, "model")) == {"vit_tiny"}


def test_hostile_names_in_the_page(tmp_path, open_page):
    made = [entry(name, s, correct=((8, None), (s + 5, 9))) for name in HOSTILE for s in range(2)]
    for one in made:
        one["scenario"] |= {"eval_names": ["<i>x</i>", "=1+1"], "kind": "<u>"}
        one["marks"] = ["<b>mark</b>"]
    tab = open_page(html.write(fill(tmp_path, made)))
    assert {contents._cut(name) for name in HOSTILE} == set(tab(NAMES))
    for fragment in ("", "#compare", *(f"#row={key}" for key in keys_of(tab).values())):
        tab(f"location.hash = {json.dumps(fragment)}")
        tab.frame()
        assert tab("document.querySelectorAll('img, i, u, b b, script').length") == 3  # the data, the library and the script
        assert tab("document.documentElement.scrollWidth <= innerWidth")
    csvs = tab("document.querySelectorAll('#row figure').length")
    assert csvs >= 3


def busy(tab, act):
    """Processor seconds that the page's thread takes for what `act` does, whatever else the machine does."""

    def spent():
        found = tab.send("Performance.getMetrics")["metrics"]
        return next(one["value"] for one in found if one["name"] == "TaskDuration")

    tab.send("Performance.enable", timeDomain="threadTicks")
    before = spent()
    act()
    tab.frame()
    return spent() - before


def test_two_thousand_records(tmp_path, open_page, browser):
    counts = [entry(f"learner{i % 500}", i // 500, f"scenario{i % 3}", stair(10, 60 + i % 40), 100) for i in range(2000)]
    start = time.process_time()
    path = html.write(fill(tmp_path, counts))
    assert time.process_time() - start < 60 and path.stat().st_size < 3_000_000
    tab = browser.tab()
    assert busy(tab, lambda: tab.open(path, timeout=60)) < 5  # processor seconds, about 0.6
    assert len(tab(NAMES)) == 200
    click = "%s.click(); document.body.offsetHeight"
    assert busy(tab, lambda: tab(click % "document.querySelector('#table button[data-column=seconds]')")) < 1
    assert busy(tab, lambda: tab(click % "[...document.querySelectorAll('#board-more button')].at(-1)")) < 5
    assert len(tab(NAMES)) == 1500
    assert busy(tab, lambda: tab(click % "document.querySelector('#table button[data-column=last]')")) < 5
    assert tab.troubles() == []
    tab.close()


def saved(tab, selector):
    """The file that a download button makes: its name and text."""
    tab("window.caught = []; if (!window.real) window.real = URL.createObjectURL.bind(URL);"
        "URL.createObjectURL = (blob) => { window.caught.push(blob); return window.real(blob); };"
        "HTMLAnchorElement.prototype.click = function () { window.name_ = this.download; }")  # fmt: skip
    tab(f"document.querySelector({json.dumps(selector)}).click()")
    wait(tab, "window.caught.length")
    return tab("window.name_"), tab("window.caught[0].text()")


def test_downloads(committed, open_page):
    tab = open_page(committed)
    name, text = saved(tab, "#board-tools button")
    lines = list(csv.DictReader(io.StringIO(text)))
    assert name == "leaderboard.csv" and len(lines) == len(rows(record.read_all(RESULTS / "records")[0]))
    assert all(line["command"].startswith("clbench run ") for line in lines)
    tab("location.hash = document.querySelector('#table tbody a').getAttribute('href')")
    drawn(tab, "#row")
    for k in range(tab("document.querySelectorAll('#row figure').length")):
        tab(f"document.querySelectorAll('#row figure')[{k}].id = 'f{k}'")
        name, text = saved(tab, f"#f{k} .save button")
        root = ET.fromstring(text.encode())
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and name.endswith(".svg") and "var(" not in text
        name, text = saved(tab, f"#f{k} .save button + button")
        body = list(csv.reader(io.StringIO(text)))
        assert name.endswith(".csv") and len(body) > 1 and len({len(line) for line in body}) == 1


def test_opening_by_fragment_and_going_back(committed, collected, open_page):
    data = collected
    place = next(i for i, line in enumerate(data["lines"]) if line[1] == "replay" and line[0] == "cil_digits")
    tab = open_page(committed, f"#row={data['keys'][place]}")
    assert tab("document.querySelector('#row h1').textContent") == "replay" and tab("document.getElementById('home').hidden")
    assert tab("document.querySelector('#row .command code').textContent") == data["commands"][place]
    assert "after experience" in drawn(tab, "#row")[0]
    tab("document.querySelector('#row figure .numbers summary').click()")
    tab.frame()
    shown = tab("[...document.querySelectorAll('#row figure .numbers tbody tr')].map((r) => r.textContent)")
    runs = [e for e in record.read_all(RESULTS / "records")[0] if summarize(e).variant == data["keys"][place]]
    mean = sum(e["correct"][-1][0] / e["n"][0] for e in runs) / len(runs)
    assert f"5exp0{float(f'{100 * mean:.4g}'):g}" in shown
    tab("document.querySelector('#row .back a').click()")
    tab.frame()
    assert not tab("document.getElementById('home').hidden")
    tab("location.hash = '#row=nothing'")
    tab.frame()
    assert not tab("document.getElementById('home').hidden")


def test_side_by_side_against_scipy(tmp_path, open_page):
    from scipy import stats

    x, y = ([60, 70, 65, 72], [66, 71, 72, 73])
    runs = [entry(name, s, correct=((v,),), n=100) for name, values in (("a", x), ("b", y)) for s, v in enumerate(values)]
    runs += [entry("b", 9, correct=((1,),), n=100), entry("far", 0, scenario="other"), entry("one", 0, correct=((64,),), n=100)]
    tab = open_page(html.write(fill(tmp_path, runs)))
    keys = keys_of(tab)
    test = stats.ttest_rel(y, x)
    low, high = test.confidence_interval()

    def ruling(a, b):
        tab(f"location.hash = '#compare={keys[a]},{keys[b]}'")
        tab.frame()
        return tab("document.querySelector('.ruling').textContent")

    text = ruling("a", "b")
    assert "not distinguishable" in text.lower() and f"+{100 * (sum(y) - sum(x)) / 400:.2f} points" in text
    assert f"p = {test.pvalue:.2f}" in text or f"p = {test.pvalue:.3f}" in text
    assert f"+{100 * high / 100:.2f}" in text and f"{abs(low):.2f}" in text and "4 shared seeds" in text
    assert "one seed is shared" in ruling("a", "one") and "Not comparable" in ruling("a", "far")
    tab("(() => { const b = document.querySelector('#pick-B'); b.selectedIndex = 0; b.dispatchEvent(new Event('change')); })()")
    tab.frame()
    assert keys["a"] in tab("location.hash")


def test_better_is_said(tmp_path, open_page):
    runs = [entry(name, s, correct=((v + s,),), n=100) for name, v in (("low", 40), ("high", 80)) for s in range(4)]
    runs[0] = entry("low", 0, correct=((41,),), n=100)
    tab = open_page(html.write(fill(tmp_path, runs)))
    assert "Better than the other contender" in tab("document.querySelector('.card').textContent")
    boxes = "[...document.querySelectorAll('#table tbody input')]"
    tab(f"{boxes}.forEach((box) => box.click()); location.hash = document.querySelector('#tray a').getAttribute('href')")
    tab.frame()
    assert "high, is better by 39.8 points" in tab("document.querySelector('.ruling').textContent")


def test_nothing_is_told_apart_before_five_seeds(tmp_path, open_page):
    """`Cannot be told` only where it is true after five shared seeds; with fewer the page says that it is undecided."""
    close = [50, 53, 49, 52, 51, 50]

    def card(folder, seeds):
        folder.mkdir()
        runs = [entry(n, s, correct=((close[(s + k) % 6],),), n=100) for k, n in enumerate("ab") for s in range(seeds)]
        return open_page(html.write(fill(folder, runs)))("document.querySelector('.card').textContent")

    few, many = card(tmp_path / "few", 4), card(tmp_path / "many", 6)
    assert "Undecided with 4 shared seeds at most" in few and "Cannot be told" not in few
    assert "Cannot be told from it after 6 shared seeds" in many and "Undecided" not in many


def test_the_page_answers(tmp_path, open_page):
    """Ranks with ties, worst class order with its interval, win rates across streams, and what changed."""
    from clbench.report import report

    def run(name, seed, value, scenario="one", order="m"):
        made = entry(name, seed, scenario, correct=((value + seed % 2,),), n=100)
        made["scenario"] |= {"manifest_sha256": order * 64}
        made["run_id"] = record.run_id(made["config"], order * 64, "w" * 64, None)
        return made

    fill(tmp_path, [run("old", s, 20) for s in range(3)])
    report(tmp_path)
    values = {"a": 80, "b": 60, "c": 60}
    runs = [
        run(n, s, v + {"a": s % 3, "b": s % 4 == 1}.get(n, 0), o, o[0])
        for n, v in values.items()
        for s in range(6)
        for o in ("one", "two")
    ]
    path = html.write(fill(tmp_path, [*runs, *[run("a", s, 55, order="d") for s in range(3)]]), since=tmp_path)
    tab = open_page(path)
    rank = dict(zip(tab(NAMES), column(tab, "rank"), strict=True))
    assert rank == {"a": "1", "b": "2\u20133", "c": "2\u20133", "old": rank["old"]}
    tab.frame()
    across = drawn(tab, "#across")
    assert "win rate" in across[0] and "a b c" in across[0]
    orders = tab("document.querySelector('#across table.bare:not(figure table)').textContent")
    assert "a" in orders and "55.3" in orders and "dddddddd" in orders
    changes = tab("document.getElementById('changed-list').textContent")
    assert "New: " in changes and "Gone" not in changes and "old" not in changes
    assert tab("document.querySelectorAll('#changed-list tbody tr').length") == 7
    tab("document.getElementById('scatter-stream').selectedIndex = 1")
    tab("document.getElementById('scatter-stream').dispatchEvent(new Event('change'))")
    assert "time of a run" in drawn(tab, "#cost")[0]


def test_two_rows_say_what_python_computed(committed, collected, open_page):
    """No second implementation: the page holds the numbers of `answers` and prints them."""
    data = collected
    i, j, n, mean, low, high, *_ = next(pair for pair in data["pairs"] if pair[2] == 5 and pair[4] is not None)
    tab = open_page(committed, f"#compare={data['keys'][i]},{data['keys'][j]}")
    text = tab("document.querySelector('.ruling').textContent").replace("\u2212", "-")
    assert (
        f"{100 * mean:+.2f} points" in text and f"{100 * low:+.2f} to {100 * high:+.2f}" in text and f"{n} shared seeds" in text
    )
    own = "".join((html.FOLDER / f"{name}.js").read_text() for name in html.SCRIPTS)
    assert not re.search(r"Math\.(sqrt|atan|exp|log)|createElementNS|holm\(", own)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 390, 1400])
def test_windows_and_themes(committed, open_page, width, dark):
    tab = open_page(committed, width=width, height=800, dark=dark)
    back = "getComputedStyle(document.body).backgroundColor"
    light = tab(back) == "rgb(255, 255, 255)"
    assert light is not dark
    key = tab("document.querySelector('#table tbody tr[data-key]').dataset.key")
    for fragment in ("", f"#row={key}", "#compare"):
        tab(f"location.hash = {json.dumps(fragment)}")
        tab.frame()
        assert tab("document.documentElement.scrollWidth") <= width == tab("innerWidth")
    tab("document.getElementById('theme').click()")
    assert (tab(back) == "rgb(255, 255, 255)") is dark
    tab.open(committed)
    assert (tab(back) == "rgb(255, 255, 255)") is dark  # it is remembered


def test_keyboard_and_names_for_readers(committed, open_page):
    tab = open_page(committed)
    tab.key("Tab")
    assert tab("document.activeElement.className") == "skip"
    named = "e.textContent.trim() || e.getAttribute('aria-label') || (e.labels && e.labels.length)"
    nameless = f"[...document.querySelectorAll('button, a[href], select, input, summary')].filter((e) => !({named})).length"
    assert tab(nameless) == 0 and tab("document.querySelectorAll('#table caption, #table th[scope=col]').length") > 9
    assert tab("document.querySelectorAll('svg[role]:not([aria-label])').length") == 0
    tab("document.querySelector('#table tbody input').focus()")
    tab.key(" ")
    assert not tab("document.getElementById('tray').hidden")
    tab.key("Tab")
    tab.key("Enter")  # the link of the row
    tab.frame()
    assert not tab("document.getElementById('row').hidden") and tab("document.activeElement.id") == "row"
    tab("document.querySelector('#row .numbers summary').click()")
    tab.frame()
    assert tab("document.querySelectorAll('#row .numbers[open] td').length") > 3


def test_print(committed, open_page):
    tab = open_page(committed, dark=True)
    tab("window.dispatchEvent(new Event('beforeprint'))")
    assert tab("document.documentElement.dataset.theme") == "light"
    tab("window.dispatchEvent(new Event('afterprint'))")
    assert tab("document.documentElement.dataset.theme") == "dark"
    assert len(tab.send("Page.printToPDF")["data"]) > 10_000


def test_curves_and_gaps_are_drawn(tmp_path, open_page):
    curves = {"tokens": list(range(0, 4000, 10)), "loss": [4 / (1 + i / 40) for i in range(400)], "boundaries": [2000]}
    curves["lr"] = [1e-3] * 400
    trace = [{"experience": i // 5, "correct": [9 - i % 5, 5 if i > 4 else None], "n": [10, 10]} for i in range(10)]
    made = [entry("a", s, curves=curves, stability={"trace": trace}) for s in range(2)] + [entry("b", 0)]
    tab = open_page(html.write(fill(tmp_path, made)))
    keys = keys_of(tab)
    titles = "[...document.querySelectorAll('#row figure h3')].map((h) => h.textContent)"
    for name, wanted in (("a", 6), ("b", 4)):
        tab(f"location.hash = '#row={keys[name]}'")
        texts = drawn(tab, "#row")
        assert len(tab(titles)) == len(texts) == wanted and tab("document.querySelectorAll('#row figure svg').length") == wanted
        assert "accuracy (%)" in texts[1] and "points lost since the best" in texts[2]
    tab(f"location.hash = '#row={keys['a']}'")
    tab.frame()
    assert {"Training loss and learning rate", "Accuracy inside experiences"} <= set(tab(titles))


def test_an_empty_folder_opens(tmp_path, open_page):
    tab = open_page(html.write(tmp_path))
    assert "No records yet" in tab("document.body.textContent")
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "half.json").write_text('{"schema": 1, "<b>')
    tab = open_page(html.write(tmp_path))
    assert "half.json" in tab("document.getElementById('lost').textContent")


def test_the_policy_is_enforced(committed, browser):
    tab = browser.tab()
    tab.open(committed)
    heard = "new Promise((done) => {{ document.addEventListener('securitypolicyviolation', (e) => done(e.effectiveDirective), {{ once: true }}); {} }})"  # noqa: E501
    assert tab(heard.format("fetch('http://127.0.0.1:9/').catch(() => 0);")) == "connect-src"
    assert tab(heard.format("const i = new Image(); i.src = 'http://127.0.0.1:9/x.png';")) == "img-src"
    markup = "(() => { try { document.body.innerHTML = '<b>x</b>'; return 'done'; } catch (e) { return e.name; } })()"
    assert tab(markup) == "TypeError"
    tab.close()


def test_formulas_are_told(collected):
    data = collected
    assert {name for name in data["names"] if name in metrics.FORMULAS} <= data["formulas"].keys()


def test_a_stream_names_its_operators():
    """Two streams of one scenario differ by them; a name from outside is cut, never markup."""
    scenario = {"name": "cil", "manifest_sha256": "m" * 64, "operators": ["permute", *HOSTILE]}
    found = contents._stream(entry(scenario=scenario["name"]) | {"scenario": scenario})["operators"]
    assert found[0] == "permute" and len(found) == 1 + len(HOSTILE) and max(map(len, found)) <= 61
    assert contents._stream(entry())["operators"] == []
