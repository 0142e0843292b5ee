"""The guide: topics, and the page of coverage that is made from the learners."""

import pytest

from clbench.config import families, registry
from clbench.guide import coverage, topics
from clbench.interfaces import UserError


def test_help_shows_topics_and_commands(clbench):
    shown = clbench("help").stdout
    assert all(f"  {topic}" in shown for topic in topics.topics())
    assert clbench("help", "coverage").stdout == topics.read("coverage")
    assert clbench("help", "run").stdout == clbench("run", "--help").stdout
    wrong = clbench("help", "covrage", code=2).stderr
    assert wrong == f"clbench: no topic 'covrage'; did you mean 'coverage'? (one of: {', '.join(topics.topics())})\n"


def test_the_committed_page_is_what_the_code_makes():
    assert topics.read("coverage") == coverage.page(coverage.load()), "run python -m clbench.guide.coverage"


def test_the_page_counts_its_own_rows():
    """Counted again from the text of the page: names in a suite's column, and words in the second one."""
    found = coverage.load()
    lines = coverage.page(found).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| method"))
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[start:] if line.startswith("|")]
    for key, suite in found["suites"].items():
        listed = [(name, row[1]) for row in rows for name in row[head.index(suite["name"])].split(", ") if name]
        assert coverage.counts(found, key) == (sum(bool(here) for _, here in listed), len(listed)), key
        assert len({name for name, _ in listed}) == len(listed), "a name of a suite stands in two rows"


def test_what_is_here_alone_has_no_row():
    found = coverage.load()
    alone = {name for names in coverage.only_here(found).values() for name in names}
    elsewhere = {coverage.learner_of(row) for row in found["methods"] if "here" in row}
    every = {name for name in registry.choices("learner") if registry.asks("learner", name) == "predict"}
    assert not alone & elsewhere and alone | elsewhere >= {n for n in every if registry.origin(path_of(n)) == "clbench"}


def path_of(name):
    return registry.choices("learner")[name][0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{method: X, here: learner=nobody, pilot: x}", "no learner 'nobody'"),
        ("{method: X, here: learner=ncm, pillot: x}", "no suite 'pillot'"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, row, message):
    path = tmp_path / "peers.yaml"
    path.write_text("suites: {pilot: {name: PILOT}}\nmethods:\n  - " + row)
    with pytest.raises(UserError, match=message):
        coverage.load(path)


def test_every_learner_names_its_family(clbench):
    own = {name: path for name, (path, *_) in registry.choices("learner").items() if registry.origin(path) == "clbench"}
    found = {name: families.learner_family(path) for name, path in own.items()}
    assert [name for name, family in found.items() if family == "other"] == []
    assert {family for family in found.values()} == set(families.LEARNERS) - {"other"}, "a family without a learner"
    listed = [
        line.strip() for line in clbench("list", "learners").stdout.splitlines() if line.startswith(" ") and line[1] != " "
    ]
    assert listed[: len(families.LEARNERS) - 1] == list(families.LEARNERS[:-1])
    for name, family in found.items():
        assert (registry.asks("learner", name) == "loss") == (family == "continual pre-training"), name
        assert (registry.asks("learner", name) == "logits") == (family == "model editing"), name
        assert (registry.asks("learner", name) == "next_token") == (family == "continual fine-tuning"), name


def test_a_family_that_nobody_knows_is_other(tmp_path):
    path = tmp_path / "mine.yaml"
    for text, family in {
        "# Mine\n_target_: a.B\n": "other",
        "# Mine\n# family: my own\n_target_: a.B\n": "other",
        "# Mine\n# family: online\n_target_: a.B\n": "online",
    }.items():
        path.write_text(text)
        assert families.learner_family(path) == family
        assert registry.description(path) == "Mine"
