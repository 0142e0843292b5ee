"""The page results/bench/README.md shows what the committed files hold."""

import json
import re

import pytest
from conftest import ROOT

from clbench.bench import scaling, startup, table, tokens

WHERE = ROOT / "results" / "bench"
BLOCKS = dict(
    re.findall(r"<!-- (\w+):start -->\n```text\n(.*?)\n```\n<!-- \1:end -->", (WHERE / "README.md").read_text(), re.S)
)
TEXTS = {
    "cpu_targets": lambda found: table.cases_text(found, found["targets"]),
    "scaling": scaling.text,
    "startup": startup.text,
    "tokens": tokens.text,
}


def found(name):
    return json.loads((WHERE / f"{name}.json").read_text())


@pytest.mark.parametrize("path", sorted(WHERE.glob("*.json")), ids=lambda path: path.stem)
def test_the_page_shows_the_file(path):
    assert BLOCKS[path.stem] == TEXTS[path.stem](json.loads(path.read_text()))


def test_the_growth_file_is_whole():
    measured = found("scaling")
    sizes = {(r["against"], r["size"]) for r in measured["rows"]}
    assert sizes == {("experiences", t) for t in (5, 10, 20, 50, 100)} | {("classes", k) for k in (10, 30, 100, 300, 1000)}
    assert not measured["quick"]
    for said, again in zip(measured["exponents"], scaling.exponents(measured["rows"]), strict=True):
        for name, value in again.items():
            assert said[name] == (
                value if value is None or isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-3)
            ), name
