"""Every format disarms every cell; LaTeX is compiled where there is a compiler."""

import csv
import html.parser
import io
import json
import math
import re
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.interfaces import UserError
from clbench.report import formats
from clbench.report.formats import Table, render

NASTY = [
    "=cmd|' /C calc'!A0",
    'a,"b";c',
    "<script>alert(1)</script>&amp;",
    "naïve Łódź ß č å ç é 🙂 中文",
    "line\nbreak\ttab",
    "-1+1",
    "@SUM(A1)",
    "\\input{/etc/passwd}",
    "\\write18{ls} $x^2$ #1 100% & ~ _ { } ^",
    "*[x](javascript:alert(1)) `code` | pipe | https://a.b",
    "\x1b[31mred\u202e\ud800\x00",
    "--- ?`!` <<>> ``''",
    "",
]


def table(words=NASTY):
    rows = [{"name": word, "value": i / 3, "on": i % 2 == 0, "none": None} for i, word in enumerate(words)]
    return Table("t", "a_title & <more>", ("name", "value", "on", "none"), rows, ("a note: 5 % _x_",))


def test_csv_has_every_row_and_no_formula():
    lines = list(csv.DictReader(io.StringIO(render([table()], "csv"))))
    assert len(lines) == len(NASTY) and not any(line["name"][:1] in "=+-@" for line in lines if line["name"])
    assert lines[1] == {"name": 'a,"b";c', "value": "0.3333", "on": "no", "none": ""}
    numbers = Table("n", "", ("v",), [{"v": -0.5}, {"v": -3}, {"v": math.nan}])
    assert render([numbers], "csv").split("\n") == ["v", "-0.5000", "-3", '""']


def test_json_is_json_and_keeps_words_and_numbers():
    found = json.loads(render([table()], "json"))
    assert [row["name"] for row in found] == NASTY and found[3]["value"] == 1.0 and found[0]["none"] is None
    odd = Table("n", "", ("v",), [{"v": math.nan}, {"v": math.inf}])
    assert json.loads(render([odd], "json")) == [{"v": None}, {"v": None}]
    both = json.loads(render([table(), Table("u", "", ("v",), [])], "json"))
    assert list(both) == ["t", "u"] and both["u"] == []


def test_markdown_keeps_its_columns():
    lines = [line for line in render([table()], "md").splitlines() if line.startswith("|")]
    assert len(lines) == len(NASTY) + 2
    for line in lines:
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 5, line
    text = "\n".join(lines)
    assert "<script" not in text and not re.search(r"(?<!\\)\]\(", text) and "https://" not in text and "\x1b" not in text
    assert "cil_digits" in formats.markdown("cil_digits") and formats.markdown("_a_") == r"\_a\_"


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.cells = set(), 0

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.cells += tag == "td"


def test_html_has_no_tag_from_a_cell():
    parser = Tags()
    text = render([table()], "html")
    parser.feed(text)
    assert parser.seen == {"table", "caption", "thead", "tbody", "tr", "th", "td", "p"} and parser.cells == 4 * len(NASTY)
    assert "&lt;script&gt;" in text and "&amp;amp;" in text


def test_text_is_aligned_and_says_none():
    lines = render([table(["a", "long name"])], "text").splitlines()
    assert lines[0] == "a_title & <more>" and lines[2].split() == ["a", "0.0000", "yes", "-"]
    assert not any(c in render([table()], "text") for c in "\x1b\u202e\ud800\x00")


def structure(text):
    """Braces balance and no special character stands alone: what a compiler would trip over. -> the rows"""
    bare = re.sub(r"\\[^A-Za-z]", "", text)  # escaped characters and accents
    body = bare.split(r"\midrule")[1].split(r"\bottomrule")[0]
    assert bare.count("{") == bare.count("}") and body.count("$") % 2 == 0
    assert not re.search(r"[%#_^~]", body)
    return body


def test_latex_escapes():
    text = render([table()], "latex")
    body = structure(text)
    assert text.isascii() and "input{" not in body.replace(r"\textbackslash{}input", "") and "\\write" not in body
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1 and r"\usepackage{booktabs}" in text
    assert len(re.findall(r"(?<!\\)&", text.split(r"\midrule")[1])) == 3 * len(NASTY)
    assert formats.latex("é_%") == r"\'{e}\_\%" and "U+1F642" in formats.latex("🙂") and formats.latex("±") == r"$\pm$"


def test_latex_compiles(tmp_path):
    tool = shutil.which("pdflatex") or shutil.which("tectonic") or shutil.which("lualatex")
    if tool is None or subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True).returncode:
        pytest.skip("no LaTeX with booktabs here")
    (tmp_path / "t.tex").write_text(formats.latex_document(render([table()], "latex")) + "\n")
    options = [] if "tectonic" in tool else ["-halt-on-error", "-interaction=nonstopmode"]
    done = subprocess.run([tool, *options, "t.tex"], cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0 and (tmp_path / "t.pdf").stat().st_size > 1000, done.stdout[-1500:]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30))
def test_any_word_in_any_format(word):
    one = table([word])
    text = render([one], "latex")
    assert text.isascii() and text.count("\n") == render([table(["x"])], "latex").count("\n")
    assert structure(text).count("&") == 3
    (line,) = csv.DictReader(io.StringIO(render([one], "csv")))
    assert not line["name"][:1] or line["name"][0] not in "=+-@"
    assert json.loads(render([one], "json"))[0]["name"] == word
    parser = Tags()
    parser.feed(render([one], "html"))
    assert parser.cells == 4
    rows = [line for line in render([one], "md").split("\n") if line.startswith("|")]
    assert len(rows) == 3 and len(re.findall(r"(?<!\\)(?:\\\\)*\|", rows[2])) == 5


def test_which_format():
    assert formats.form_of(None, None) == "text" and formats.form_of("md", "x.csv") == "md"
    assert formats.form_of(None, "a.b/table.TEX") == "latex"
    for name in ("table.pdf", "table"):
        with pytest.raises(UserError, match="--format"):
            formats.form_of(None, name)


def test_parts():
    two = [table(), Table("rows", "", ("v",), [{"v": 1}])]
    assert render(two, "csv", "rows") == "v\n1"
    with pytest.raises(UserError, match="did you mean 'rows'"):
        render(two, "text", "row")
    with pytest.raises(UserError, match="CSV holds one table"):
        render(two, "csv")


def test_no_negative_zero():
    assert formats.fraction(-0.00001) == "0.0000" and formats.fraction(-0.5, 1) == "-0.5" and formats.fraction(-0.0, 0) == "0"
