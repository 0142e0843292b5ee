"""What the report shows of edits: the terminal's lines, the figure, the page in Chromium; each against the records."""

import pytest
from test_editing import RUN
from test_html import browser, drawn, open_page  # noqa: F401

from clbench.config import compose
from clbench.evaluation import edit_metrics
from clbench.interfaces import UserError
from clbench.records import record
from clbench.report import folder
from clbench.report.figures import plots
from clbench.report.page import contents, html
from clbench.run.runner import run_job


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two learners, one with two seeds."""
    made = tmp_path_factory.mktemp("edited")
    for learner, seed in (("grace", 0), ("grace", 1), ("edit_finetune", 0)):
        (job,) = compose.compose([*RUN, f"learner={learner}", f"seed={seed}", f"results_dir={made}"])
        assert run_job(job).status == "ok"
    return made


@pytest.fixture(scope="module")
def courses(results):
    found = {}
    for entry in record.entries(results / "records", []):
        found.setdefault(entry["learner"]["name"], []).append(edit_metrics.course(entry))
    return found


def test_the_terminal_has_a_line_a_learner(results, courses):
    text, code = folder.report(results)
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if "reliability / generalisation / locality, per cent" in line)
    assert code == 0 and lines[start + 1].split() == ["learner", "variant", "1", "edit", "3", "edits"]
    shown = {line.split()[0]: line.split("  ") for line in lines[start + 2 : start + 4]}
    assert set(shown) == {"grace", "edit_finetune"}
    names = ("reliability", "generalisation", "locality")
    for learner, cells in shown.items():
        means = [{n: sum(c[i][n] for c in courses[learner]) / len(courses[learner]) for n in names} for i in range(2)]
        expected = [" / ".join(f"{100 * mean[n]:.0f}" for n in names) for mean in means]
        assert [cell.strip() for cell in cells if "/" in cell] == expected


def test_the_figure_needs_edits(results, tmp_path):
    (made,) = plots.write(results, tmp_path, ["edits"])
    text = made.read_text()
    assert made.name.startswith("edits-edit_facts") and "grace" in text and "edit_finetune" in text
    assert [p.name for p in plots.write(results, tmp_path)] == [made.name]  # and no figure of accuracies
    with pytest.raises(UserError, match="nothing to draw for leaderboard"):
        plots.write(results, tmp_path, ["leaderboard"])


def test_the_page_has_means_over_seeds(results, courses):
    data = contents.collect(results)["edits"]
    assert [s["looks"] for s in data["streams"]] == [[1, 3]] and data["about"] == edit_metrics.ABOUT
    rows = {row["learner"]: row for row in data["rows"]}
    assert len(rows["grace"]["runs"]) == 2 and "learner=grace" in rows["grace"]["command"]
    for learner, row in rows.items():
        for i, step in enumerate(row["course"]):
            expected = sum(c[i]["old_loss_rise"] for c in courses[learner]) / len(courses[learner])
            assert step["edits"] == (1, 3)[i] and step["old_loss_rise"] == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_the_page_draws_them(results, tmp_path, open_page):  # noqa: F811
    tab = open_page(html.write(results, tmp_path / "page.html"))
    assert tab("document.getElementById('edits').hidden") is False and tab("document.getElementById('board').hidden") is True
    names = tab("[...document.querySelectorAll('#edit-streams tbody tr')].map((r) => r.children[0].textContent)")
    assert sorted(names) == ["edit_finetune", "grace"]
    (texts,) = drawn(tab, "#edit-streams")
    for words in (
        "all edits so far",
        "their paraphrases",
        "neighbours unchanged",
        "rise on old text",
        "grace",
        "edit_finetune",
    ):
        assert words in texts
