"""`clbench schedule show`: what it prints, what it draws, what it refuses, and that it loads no torch."""

import re
import subprocess
import sys

import pytest

from clbench.cli.main import answer


@pytest.fixture
def show(capsys):
    def run(*words, code=0):
        assert answer(["schedule", "show", *words]) == code
        done = capsys.readouterr()
        return done.err if code else done.out

    return run


def test_table_holds_the_golden_values(show):
    out = show("infinite", "infinite@line", "infinite@line.shape=linear", "--steps", "1000")
    rows = {tuple(map(int, line.split()[:2])): line.split()[2:] for line in out.splitlines() if re.match(r" +\d+ +\d+ ", line)}

    assert float(rows[0, 100][0]) == pytest.approx(2.9240 / 3, rel=1e-4)
    assert float(rows[0, 100][1]) == pytest.approx(2.7941 / 3, rel=1e-4)
    assert rows[0, 700] == rows[1, 0] == ["0.55", "0.55"]


def test_sketch_and_ranking(show):
    out = show("constant", "linear", "wsd", "--experiences", "1", "--steps", "400")
    sketches = out.split("\n\n")[1:4]
    assert sketches[0].splitlines() == ["constant", "     1 |" + "*" * 72, *["       |"] * 6, "     0 |"]
    assert sketches[1].splitlines()[1].startswith("     1 |*") and sketches[1].splitlines()[-1].startswith("     0 |   ")
    ranks = re.findall(r"^ +(\d)  (\w+) +([\d.]+) +([\d.]+) ", out, re.M)
    assert [(rank, name) for rank, name, *_ in ranks] == [("1", "linear"), ("2", "wsd"), ("3", "constant")]
    assert float(ranks[0][2]) == pytest.approx(2.0126, abs=2e-4) and float(ranks[2][2]) == pytest.approx(2.7509, abs=2e-4)
    assert " old" not in out.partition("rank")[2].splitlines()[0]
    two = show("cosine", "--steps", "100")
    assert two.split("\n\n")[1].splitlines()[4].count("|") == 2 and "new" in two.partition("rank")[2].splitlines()[0]


def test_options_for_one_and_for_all(show):
    out = show("linear", "cosine", "cosine@x", "end=0.5", "cosine@x.end=2.5e-1", "--steps", "100000")
    last = next(line for line in out.splitlines() if line.split()[:2] == ["1", "99999"]).split()[2:]
    assert [round(float(value), 3) for value in last] == [0.5, 0.5, 0.25]


@pytest.mark.parametrize("name", ["all.svg", "all.png"])
def test_a_figure(show, tmp_path, name):
    pytest.importorskip("vl_convert", reason="vl-convert is not installed (extra: report)")
    out = show("cosine", "infinite", "--out", str(tmp_path / name))
    assert out.endswith(f"written {tmp_path / name}\n")
    content = (tmp_path / name).read_bytes()
    assert b"<svg" in content[:1000] if name.endswith("svg") else content.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cosin"], "no schedule 'cosin'; did you mean 'cosine'? (one of: "),
        (["end=1"], "say which schedule: clbench schedule show cosine infinite"),
        (["cosine", "cosine"], "each schedule may be named once; NAME@TEXT names another setting of it"),
        (["cosine", "ende=2"], "'ende=2': no option 'ende'; did you mean 'end'? (one of: end, warmup)"),
        (["cosine", "wsd.end=2"], "'wsd.end=2': no schedule 'wsd' is shown"),
        (["constant", "end=2"], "'end=2': no option 'end' (one of: none)"),
        (["cosine", "_target_=os.system"], "'_target_=os.system': no option '_target_'"),
        (["cosine", "cosine.end=a"], "cosine.end must be float, got 'a'"),
        (["cosine", "end=[1"], "'end=[1': [1 is no value"),
        (["wsd", "shape=tanh"], "wsd.shape must be cosine or exponential or inverse or linear"),
        (["infinite", "warmup=2"], "schedule.warmup must lie from 0 to 1, got 2"),
        (["cosine", "--steps", "1"], "--steps must be at least 2"),
        (["cosine", "--experiences", "0"], "--steps must be at least 2"),
        (["cosine", "--lr", "nan"], "--steps must be at least 2"),
        (["cosine", "--steps", "10000000"], "--steps times --experiences must be at most 10 million"),
        (["cosine", "--out", "a.gif"], "--out a.gif: the name must end in .svg, .png or .pdf"),
        (["cosine", "--out", "/no/such/a.svg"], "--out /no/such/a.svg: there is no folder /no/such"),
        (["cosine", "--step", "7"], "no option --step; did you mean '--steps'?"),
    ],
)
def test_mistakes_are_one_line(show, words, message):
    err = show(*words, code=2)
    assert err.startswith(f"clbench: {message}") and err.count("\n") == 1


def test_loads_no_torch():
    code = (
        "import sys; from clbench.cli.main import answer; answer(['schedule', 'show', 'wsd']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
