"""The guide as a site: every choice and public name has its part, every link leads somewhere, mkdocs has no warnings."""

import ast
import re

import pytest
from conftest import ROOT

import clbench as package
from clbench.config import defaults, families, registry
from clbench.guide.site import build, choices, learners, prose, public
from clbench.interfaces import Capabilities, UserError

CARDS = (ROOT / "results" / "CARDS.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pages():
    return build.pages(CARDS, {"run": "usage: clbench run"})


def headings(text):
    """Ids of a page's headings, those of mkdocstrings too."""
    plain = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.M | re.S)
    found = {learners.anchor(re.sub(r"[`*]", "", m)) for m in re.findall(r"^#+ (.+)$", plain, re.M)}
    return found | set(re.findall(r"^::: (\S+)$", plain, re.M))


def test_every_choice_has_its_part(pages):
    for group, names in choices.names().items():
        held = [file for file in pages if file.startswith("scenarios/" if group == "scenario" else f"choices/{group}s.md")]
        assert held, group
        known = set().union(*(headings(pages[file]) for file in held))
        if group == "evaluator":
            assert all(f"`{name}`" in pages[held[0]] or name in known for name in names)
        else:
            assert {learners.anchor(name) for name in names} <= known, group
    assert {f"learners/{name}.md" for name in registry.choices("learner")} <= pages.keys()


@pytest.mark.parametrize("name", ["slca", "rome", "pass", "ncm"])
def test_a_learner_says_what_its_files_say(pages, name):
    page, path = pages[f"learners/{name}.md"], registry.choices("learner")[name][0]
    node = defaults.read(path)
    for option in node:
        assert option.startswith("_") or f"| `{option}` |" in page, option
    assert prose.text(registry.description(path)) in page and node["_target_"] in page
    paper = ast.get_docstring(ast.parse((ROOT / (node["_target_"].rpartition(".")[0].replace(".", "/") + ".py")).read_text()))
    assert prose.text(paper.splitlines()[0].rstrip()) in page


def test_cards_stand_on_their_pages(pages):
    found = learners.split_cards(CARDS)
    assert len(found) > 50 and found.keys() <= registry.choices("learner").keys()
    for name, card in found.items():
        assert card in pages[f"learners/{name}.md"] and "Gap: " in card
    path = registry.choices("learner")["slca"][0]
    assert "It has no card" in learners.page("slca", path, "bounds", None, [], "")


def test_every_public_name_is_documented(pages):
    made = "".join(text for file, text in pages.items() if file.startswith("api/"))
    for name in package.__all__:
        assert made.count(f"::: {public.home(name)}\n") == 1, name
        assert public.first_line(name), f"{name} has no docstring"
        assert f"[{name}](" in pages["api/index.md"]


def test_no_page_is_a_stub(pages):
    for file, text in pages.items():
        assert text.startswith("# ") and len(text) > 80, file
        assert not re.search(r"\b(TODO|TBD|FIXME)\b", text), file


def test_every_link_leads_somewhere(pages):
    checked = 0
    for file, text in pages.items():
        plain = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.M | re.S)
        for link in re.findall(r"(?<!\\)\]\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", plain)):
            if link.startswith(("http://", "https://")):
                continue
            where, _, anchor = link.partition("#")
            parts = [*file.split("/")[:-1], *where.split("/")] if where else file.split("/")
            while ".." in parts:
                i = parts.index("..")
                del parts[i - 1 : i + 1]
            target = "/".join(parts)
            assert target in pages, f"{file} links to {link}"
            assert not anchor or anchor in headings(pages[target]), f"{file} links to {link}"
            checked += 1
    assert checked > 500


def test_every_page_stands_in_the_navigation(pages):
    def files(node):
        if isinstance(node, str):
            return [node]
        return [file for one in (node.values() if isinstance(node, dict) else node) for file in files(one)]

    assert sorted(files(build.navigation(pages))) == sorted(pages)


def test_capabilities_are_all_explained():
    said = learners.capability_lines()
    assert said.keys() == set(Capabilities.__dataclass_fields__)
    assert said["needs_random_access"].endswith("cannot run where samples come once, in stream order")


def test_commands_know_their_families():
    assert set(learners._WORDS) <= set(families.LEARNERS) and set(learners._EXCEPTIONS) <= registry.choices("learner").keys()
    assert learners.command("vida", "test-time") == "clbench run learner=vida scenario=tta_digits"
    assert learners.command("slca", "alignment of classifiers") == "clbench run learner=slca"
    words = {word for text in (*learners._WORDS.values(), *learners._EXCEPTIONS.values()) for word in text.split()}
    chosen = [word.split("=") for word in words if word.split("=")[0] in ("scenario", "model")]
    assert chosen and all(name in registry.choices(group) for group, name in chosen)


@pytest.mark.parametrize(
    ("words", "made"),
    [
        ("a*b and `x*y` <b> [z] _q_ a_b", r"a\*b and `x*y` &lt;b&gt; \[z\] \_q\_ a_b"),
        ("see arXiv 2303.05118.", "see [arXiv 2303.05118](https://arxiv.org/abs/2303.05118)."),
    ],
)
def test_words_are_not_markup(words, made):
    assert prose.text(words) == made


def test_docstrings_become_paragraphs_blocks_and_lists():
    made = prose.docstring(
        "First\nline.\n\n    y = x  (1)\n\nvariant  which one\n    paper   as written\n            there\nAfter."
    )
    assert made.split("\n\n") == [
        "First\nline.",
        "```text\ny = x  (1)\n```",
        "- `variant`: which one\n    - `paper`: as written there",
        "After.",
    ]
    assert prose.block("a ``` b").startswith("````text\n")


def test_options_come_from_the_source(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from typing import Literal\nclass Mine:\n def __init__(self, model,\n  lr: float = 0.1,  # of the head\n"
        "  how: Literal['a', 'b'] = 'a',  # noqa: X\n  ):\n  pass\n"
    )
    found = prose.options(f"{path}:Mine", {"lr": 0.5}, ("model",))
    assert found[0] == prose.Option("lr", "float", "0.5", "of the head")
    assert found[1] == prose.Option("how", "a, b", "a", "")


def test_pages_alone_need_no_extra(clbench):
    said = clbench("site", "here", "--pages").stdout
    assert re.match(r"written \d+ pages under here/pages; no cards: results/CARDS.md is not there\n$", said)
    assert (clbench.folder / "here" / "mkdocs.yml").is_file()
    assert "usage: clbench report flips" in (clbench.folder / "here" / "pages" / "commands.md").read_text()


def test_a_folder_of_something_else_stays(tmp_path):
    few = {"index.md": "# Home\n"}
    build.write(tmp_path / "new", few)
    (tmp_path / "new" / "pages" / "old.md").write_text("# old")
    build.write(tmp_path / "new", few)
    assert not (tmp_path / "new" / "pages" / "old.md").exists()
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        build.write(tmp_path, few)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "NEEDED", ("mkdocs_that_is_not_here", "nor.this"))
    with pytest.raises(UserError, match=r"HTML needs mkdocs_that_is_not_here, nor.this: pip install 'clbench\[docs\]'"):
        build.build(tmp_path)


@pytest.mark.slow
def test_mkdocs_finds_nothing_to_warn_of(pages, tmp_path):
    if lacking := build.missing():
        pytest.skip(f"needs clbench[docs]: {', '.join(lacking)}")
    build.write(tmp_path, pages)
    first = build.build(tmp_path)
    made = {str(path.relative_to(first.parent)) for path in first.parent.rglob("*.html")}
    assert {file.removesuffix(".md") + ".html" for file in pages} <= made
    shown = (first.parent / "api" / "models.html").read_text()
    assert 'id="clbench.models.backbone.Backbone.features"' in shown
    assert not re.search(r'(?:src|<link[^>]* href)="https?://', shown), "it asks the network for something"


@pytest.mark.slow
def test_a_dead_link_stops_mkdocs(pages, tmp_path):
    if lacking := build.missing():
        pytest.skip(f"needs clbench[docs]: {', '.join(lacking)}")
    few = {"index.md": "# Home\n\n[nowhere](nothing.md)\n"}
    build.write(tmp_path, few)
    (tmp_path / "mkdocs.yml").write_text((tmp_path / "mkdocs.yml").read_text().partition("\nnav:")[0])
    with pytest.raises(UserError, match=r"nothing\.md"):
        build.build(tmp_path)
