"""A release says the same of itself everywhere."""

import re
import tomllib

from conftest import ROOT

import clbench
from clbench.records import record


def test_the_version_is_that_of_the_newest_section_and_of_the_citation():
    heads = re.findall(r"^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heads[0][0] == clbench.__version__ and heads == sorted(heads, reverse=True)
    cited = (ROOT / "README.md").read_text().rpartition("```bibtex")[2].partition("```")[0]
    assert f"version = {{{clbench.__version__}}}" in cited and f"date    = {{{heads[0][1]}}}" in cited
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]


def test_every_extra_is_named_in_the_path_of_an_upgrade():
    text = (ROOT / "CHANGELOG.md").read_text().partition("### Upgrading from 0.1.0")[2].partition("\n## ")[0]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert all(f"`{name}`" in text for name in extras)


def test_a_run_keeps_its_id_from_version_to_version(monkeypatch):
    entry = next(e for e in record.entries(ROOT / "results" / "records", []) if e["versions"]["clbench"] == "0.1.0")
    monkeypatch.setattr("clbench.run.provenance.__version__", "9.9.9")
    monkeypatch.setattr(clbench, "__version__", "9.9.9")
    sha, weights = entry["scenario"]["manifest_sha256"], entry["model"]["state_sha256"]
    assert record.run_id(entry["config"], sha, weights, entry["learner"].get("plugin")) == entry["run_id"]
