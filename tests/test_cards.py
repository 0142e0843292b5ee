"""Reproduction cards: which records a card takes, what it says of them, what it refuses; the committed ones are up to date."""

import copy
import csv
import io
import shlex

import pytest
from conftest import ROOT
from test_report import made

from clbench.config import compose
from clbench.config.registry import asks, choices, conf_dir
from clbench.interfaces import UserError
from clbench.records import record
from clbench.report import cards
from clbench.report.card_text import COLUMNS, to_csv, to_markdown
from clbench.run import provenance

CARDS = """\
streams:
  digits:
    about: some digits
    scenario: cil
    model: nano
    options: {scenario.limit: 20}
cards:
  ncm:
    title: A | B
    paper: Somebody, CONF
    year: 2020
    link: https://example.org/x
    published:
      - {protocol: P, model: M, last: 81.26, average: 87.5, source: log, checked: true}
      - {protocol: Q, model: M, last: null, average: 50, source: paper, checked: false}
    ours:
      - stream: digits
        overrides: {learner.lr: 1.0e-2}
        tuning: {grid: three rates, stream: other classes, runs: 3, seconds: 61.4}
    gap: none known
    quirks: none
"""


def run(seed=0, limit=20, lr=0.01, **changes):
    """A finished record of `ncm` on `cil` with two options."""
    entry = made(seed, **changes)
    entry["config"] |= {"scenario": {"limit": limit}, "learner": {"lr": lr}, "model": {}}
    entry["run_id"] = record.run_id(entry["config"], "m" * 64, "w" * 64, None)
    return entry


@pytest.fixture
def folder(tmp_path):
    """A results folder with the cards above; called with records, it writes them and gives the lines of ours."""
    (tmp_path / "cards.yaml").write_text(CARDS)

    def write(*entries):
        for entry in entries:
            record.write(entry, tmp_path / "records")
        cards.write(tmp_path, conf_dir())
        return [line for line in csv.DictReader(io.StringIO((tmp_path / "cards.csv").read_text())) if line["kind"] == "ours"]

    write.path = tmp_path
    return write


def test_a_card_takes_the_records_that_have_what_it_names(folder):
    others = (run(3, limit=19), run(4, lr=0.02), run(5, learner="slca"), run(6, scenario="til"), made(7))
    failed = run(8, status="failed", correct=None, error={})
    (line,) = folder(run(0), run(1, correct=((10, None), (8, 9))), failed, *others)
    assert (line["n_seeds"], line["seeds"], line["last"], line["last_std"]) == ("2", "0 1", "0.8000", "0.0707")
    assert (line["average"], line["seconds"], line["stored_bytes"]) == ("0.8500", "1.5", "100")  # ((.8 + .75) + (1 + .85)) / 4
    assert (line["tuning_runs"], line["tuning_seconds"]) == ("3", "61.4")
    page = (folder.path / "CARDS.md").read_text()
    assert "| digits | 80.00 ± 7.07 | 85.00 ± 10.61 | 0 1 | 1.5 | 0.000 | - |" in page
    assert "| [ncm](#ncm) | 80.00 ± 7.07 (2) |" in page and "three rates; on other classes; 3 runs, 61 s." in page
    assert "| P | M | 81.26 | 87.5 | log |" in page and "| Q | M | - | 50 | paper; recalled, not re-checked |" in page


def test_operators_make_another_stream(folder):
    """A record with operators belongs to a stream that names them, as they are, and to no other."""
    operators = [{"rotate": {"experiences": 5}}, "single_pass"]
    turned = run(1, lr=0.01)
    turned["config"]["scenario"]["operators"] = operators
    turned["run_id"] = record.run_id(turned["config"], "m" * 64, "w" * 64, None)
    (line,) = folder(run(0), turned)
    assert line["seeds"] == "0"
    named = "scenario.operators: [{rotate: {experiences: %d}}, single_pass]"
    for angles, seeds in ((5, "1"), (4, "")):
        text = CARDS.replace("scenario.limit: 20", f"scenario.limit: 20, {named % angles}")
        (folder.path / "cards.yaml").write_text(text)
        (line,) = folder()
        assert line["seeds"] == seeds


def test_variants_are_lines_of_their_own(folder):
    other = run(1)
    other["config"]["learner"]["momentum"] = 0.5
    other["run_id"] = record.run_id(other["config"], "m" * 64, "w" * 64, None)
    found = folder(run(0), other)
    assert [line["n_seeds"] for line in found] == ["1", "1"] and len({line["variant"] for line in found}) == 2
    assert sum("learner.momentum=0.5" in line["command"] for line in found) == 1


def test_without_records_it_says_so_and_writing_twice_changes_nothing(folder):
    (line,) = folder()
    assert line["n_seeds"] == "0" and line["last"] == line["command"] == ""
    texts = [(folder.path / name).read_bytes() for name in ("CARDS.md", "cards.csv")]
    assert b"| digits | not run |" in texts[0] and b"\r" not in texts[1]
    folder()
    assert [(folder.path / name).read_bytes() for name in ("CARDS.md", "cards.csv")] == texts


def test_names_that_would_break_the_page(folder):
    text = CARDS.replace("protocol: P,", "protocol: 'a|b\x07',".replace("\x07", "")).replace("source: log", "source: '=1+1'")
    (folder.path / "cards.yaml").write_text(text)
    folder()
    assert "| a\\|b | M |" in (folder.path / "CARDS.md").read_text()
    assert "'=1+1" in (folder.path / "cards.csv").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("streams:\n", "streams: [\n", ", line "),
        ("year: 2020", "year: x", "cards.ncm.year must be int or null, got 'x'"),
        ("    gap: none known\n", "", "cards.ncm.gap is missing"),
        ("    quirks:", "    quirk:", "cards.ncm.quirk is not a field; did you mean 'quirks'?"),
        ("checked: false", "checked: no idea", "cards.ncm.published[1].checked must be bool, got 'no idea'"),
        ("last: 81.26", "last: 812.6", "cards.ncm.published[0] must hold percentages from 0 to 100"),
        ("last: 81.26", "last: true", "cards.ncm.published[0].last must be int or float or null, got 'True'"),
        ("stream: digits", "stream: digit", "cards.ncm.ours[0].stream is 'digit', which streams does not have; did you mean"),
        ("learner.lr:", "lr:", "cards.ncm.ours[0].overrides names 'lr'; an option begins with one of scenario, learner, model"),
        ("runs: 3", "runs: few", "cards.ncm.ours[0].tuning.runs must be int, got 'few'"),
        (CARDS, "- a list", "the file must hold streams, cards, got "),
        (CARDS, "", "the file must hold streams, cards, got 'None'"),
    ],
)
def test_a_malformed_file_is_answered_in_one_line(folder, old, new, message):
    assert old in CARDS
    (folder.path / "cards.yaml").write_text(CARDS.replace(old, new))
    with pytest.raises(UserError) as caught:
        folder()
    assert str(caught.value).startswith(str(folder.path / "cards.yaml")) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_report_writes_cards_where_there_is_a_file_of_them(clbench):
    record.write(run(), clbench.folder / "results" / "records")
    clbench("report")
    assert not (clbench.folder / "results" / "CARDS.md").exists()
    (clbench.folder / "results" / "cards.yaml").write_text(CARDS)
    done = clbench("report", "--strict")
    assert "CARDS.md" in done.stdout and (clbench.folder / "results" / "cards.csv").exists()
    (clbench.folder / "results" / "cards.yaml").write_text("streams: {}\n")
    done = clbench("report", code=2)
    assert done.stderr.startswith("clbench: ") and done.stderr.count("\n") == 1 and "cards is missing" in done.stderr


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [(5e-4, "5e-4", True), (1, 1.0, True), (True, 1, False), (None, "null", False), ("1e", "1e", True), ([1], [1], True)],
)
def test_values_are_compared_as_configurations_mean_them(a, b, expected):
    assert cards.same(a, b) is expected


@pytest.mark.parametrize(
    "words",
    [
        "learner=slca",
        "learner=ncm learner.metric=cosine scenario.order=[3,1,2] scenario.num_classes=3 precision=bf16",
        "learner=lae pet=lora_lae schedule=cosine learner.weight_decay=1e-5",
        "learner=ranpac pet=none learner.ridge=null learner.projection=50",
        "learner=aper learner.pet.bottleneck=8 learner.schedule._target_=clbench.training.schedules.stepwise_cosine "
        "+learner.schedule.periods=20",
        "learner=dualprompt learner.e_blocks=[3,4] learner.g_blocks='0:1' model=nano_random scenario.sizes=[3,1] "
        "scenario.increment=null scenario.num_classes=4",
        "learner=finetune scenario=til_digits learner.head=per_task",
        "learner=tent model=resnet32 'scenario.operators=[{rotate:{angles:[0,-10.5],experiences:null}},single_pass,{test_time:"
        "{batch_size:20,order:sorted}}]'",
    ],
)
def test_the_command_makes_the_same_configuration(words):
    (job,) = compose.compose(shlex.split(words))
    parts = {part: {"name": job["names"][part]} for part in ("learner", "scenario", "model")}
    command = cards.command({**parts, "config": provenance.identity(job)}, ["7"], conf_dir())
    assert command.startswith("clbench run learner=")
    (again,) = compose.compose(shlex.split(command)[2:])
    assert provenance.identity(again) == provenance.identity(job) | {"seed": 7}


def test_a_command_of_several_seeds_is_a_sweep():
    (job,) = compose.compose(["learner=ncm"])
    entry = {part: {"name": name} for part, name in job["names"].items()} | {"config": provenance.identity(job)}
    assert cards.command(entry, ["0", "2"], conf_dir()) == (
        "clbench run -m learner=ncm scenario=cil_digits model=nano seed=0,2"
    )


def test_columns_are_explained():
    words = (ROOT / "results" / "README.md").read_text()
    assert [name for name in COLUMNS if f"`{name}`" not in words] == []


def test_presets_of_published_protocols_say_claim_number_cost_and_command():
    names = [name for name in choices("sweep") if name not in ("default_table", "core")]  # tables of our own
    assert len(names) >= 12
    board = (ROOT / "results" / "leaderboard_loss.csv").read_text().splitlines()
    for name in names:
        text = choices("sweep")[name][0].read_text()
        opening = text[: text.index("hydra:")]
        at = [opening.index(f"\n# {word}:") for word in ("Shows", "Expected", "Cost", "Command")]
        assert at == sorted(at) and f"clbench run sweep={name} " in opening, name
        measured = "\n# Found: " in opening and "results/pretraining" in opening
        assert measured or "estimate, not measured" in opening, name
        if measured:
            own = {job["scenario"]["name"] for job in compose.compose([f"sweep={name}"])}
            assert own <= {line.split(",")[0] for line in board}, f"{name} says what was found, and no record is committed"
        assert all(line.startswith("#") for line in opening.splitlines()), name


ON_REAL_DATA = {"macil", "rsiat", "sldc", "sparse_mask"}  # measured on CIFAR-100 or MNIST alone
ON_DIGITS = {  # measured on the digits stream that they are made for
    *(
        "adanpc",
        "agem",
        "bcwi",
        "bn_adapt",
        "cbp",
        "cema",
        "cls_er",
        "cofima",
        "cotta",
        "der_expand",
    ),
    *(
        "dst",
        "eata",
        "er",
        "er_ace",
        "ewc_online",
        "fast_slow",
        "figmn",
        "focal_kd",
        "foster",
        "gdumb",
        "gem",
        "gkeal",
    ),
    *("gpm", "hat", "homeostatic", "hypernetwork", "icl", "incremental_frozen", "inflora", "isolated", "l2_init"),
    *("laftr", "lame", "losse_ftl", "lucir", "mas", "memo", "merge", "mir", "model_zoo", "naive_bayes", "online_ensemble"),
    *(
        "onpro",
        "packnet",
        "par",
        "pass",
        "psmt",
        "picle",
        "rank_updates",
        "rehearsal_free",
        "rwalk",
        "s_prompts",
    ),
    *(
        "sar",
        "scr",
        "sd_lora",
        "sfr",
        "simplex",
        "shrink_perturb",
        "si",
        "slda",
        "tag",
        "tent",
        "tuna",
        "vida",
    ),
}


def test_every_learner_has_a_card_of_its_streams():
    kept = cards.load(ROOT / "results" / "cards.yaml")
    own = {
        name
        for name, (path, *_) in choices("learner").items()
        if path.is_relative_to(conf_dir()) and asks("learner", name) == "predict"
    }
    assert own > ON_DIGITS | ON_REAL_DATA and list(kept["cards"]) == sorted(own)
    for name, card in kept["cards"].items():
        streams = {entry["stream"] for entry in card["ours"]}
        assert streams and (name in ON_DIGITS | ON_REAL_DATA or streams >= {"digits", "cifar100_112"}), name
        assert card["title"] and card["quirks"] and card["gap"], name
        assert card["link"] is None or card["link"].startswith("https://"), name


def test_what_cards_name_was_measured():
    """Every entry has records, and those on digits have five seeds."""
    text = (ROOT / "results" / "cards.csv").read_text()
    lines = [line for line in csv.DictReader(io.StringIO(text)) if line["kind"] == "ours"]
    assert lines and min(int(line["n_seeds"]) for line in lines) >= 1
    assert {line["n_seeds"] for line in lines if line["name"].startswith("digits")} == {"5"}


def test_options_of_committed_cards_exist():
    """A misspelt option would match no record for ever."""
    kept = cards.load(ROOT / "results" / "cards.yaml")
    for learner, card in kept["cards"].items():
        for entry in card["ours"]:
            stream = kept["streams"][entry["stream"]]
            options = stream["options"] | entry["overrides"]
            words = [f"learner={learner}", f"scenario={stream['scenario']}", f"model={stream['model']}"]
            (job,) = compose.compose([*words, *(f"{key}={cards.word(value)}" for key, value in options.items())])
            known = cards.flat(provenance.identity(job))
            assert not [key for key in options if key not in known], (learner, entry["stream"])


def test_committed_cards_are_made_from_the_committed_records():
    kept = cards.load(ROOT / "results" / "cards.yaml")
    before = copy.deepcopy(kept)
    lines = cards.lines(kept, record.read_all(ROOT / "results" / "records")[0], conf_dir())
    assert kept == before
    stale = "clbench report makes them anew"
    assert (ROOT / "results" / "cards.csv").read_text() == to_csv(lines), stale
    assert (ROOT / "results" / "CARDS.md").read_text() == to_markdown(kept, lines), stale
