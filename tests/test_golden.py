"""Numbers that may not move: the counts, sums of losses and final tensors of every learner, in runs that train.

On the kind of processor that made them they are compared to the last bit, with one thread and torch's default arithmetic;
elsewhere counts within two images and sums of losses within 0.2 %. A run prints which comparison was made how often.
`pytest tests/test_golden.py --update-golden [-k ...]` writes them anew; the difference is shown in review, and the change is
one where numbers move, or where the keys of a state do.
"""

import copy
import functools
import itertools
import json
import pathlib
import tempfile

import numpy as np
import pytest
import torch
from filelock import FileLock
from golden_row import IMAGES, RELATIVE, differences, machine_kind, near, numbers, row_of, tensors_by_shape

from clbench.config import compose
from clbench.config.registry import asks, choices, load_target
from clbench.records import record
from clbench.run.runner import run_job
from clbench.training.state import fingerprint

FOLDER = pathlib.Path(__file__).parent / "golden"
EXACT = ("num_threads=1", "device=cpu", "arithmetic=reference", "on_error=raise")
STREAMS = {
    "images": (  # ten classes in three experiences, all 359 test images
        "scenario=cil_digits",
        "scenario.base=4",
        "scenario.increment=3",
        "scenario.limit_train=16",
        "scenario.budget.epochs=3",
        "scenario.budget.exemplars=30",
        "model=nano",
    ),
    "tokens": (
        "scenario=cpt_synthetic",
        "scenario.symbols=16",
        "scenario.states=16",
        "scenario.tokens=4096",
        "scenario.context=32",
        "scenario.batch=8",
        "scenario.eval_tokens=2048",
        "scenario.probe_sequences=4",
        "scenario.probe_evenly=0",
        "model.width=32",
        "model.depth=2",
        "model.heads=2",
    ),
    "masked": (
        "scenario=cpt_mae_digits",
        "scenario.num_classes=6",
        "scenario.limit_train=32",
        "scenario.limit_test=20",
        "scenario.epochs=4",
        "scenario.batch=16",
        "scenario.probe_look=8",
        "scenario.probe_sequences=8",
        "scenario.probe_evenly=0",
        "model.width=32",
        "model.depth=2",
        "model.decoder_width=16",
    ),
    "edits": (
        "scenario=edit_facts",
        "scenario.edits=4",
        "scenario.looks=[1,4]",
        "scenario.neighbours=2",
    ),
    "texts": (
        "scenario=text_tasks",
        "scenario.tasks=[shift_3,facts_20,lego_2]",
        "scenario.lines=96",
        "scenario.test_lines=20",
        "scenario.budget.exemplars=24",
    ),
}
OPTIONS = {  # for the stream of images: so few train at these rates, and each method's own term counts
    "adanpc": ("learner.batch_size=16", "learner.training=knn"),
    "acil": ("learner.projection=100", "learner.ridge=10"),
    "agem": ("learner.augment=none",),
    "air": ("learner.projection=100", "learner.ridge=10", "scenario.operators=[{long_tail: {ratio: 0.2}}]"),
    "aper": ("learner.pet.scale=1", "learner.lr=1", "learner.batch_size=16"),
    "bcwi": ("learner.batch_size=16", "learner.share=0.6", "learner.backbone_lr=0.003"),
    "bic": ("learner.batch_size=16",),
    "bn_adapt": ("model=convnet", "learner.lr=0.02", "learner.backbone_lr=0", "learner.batch_size=16"),
    "cbp": (
        "learner.rate=1e-3",
        "learner.maturity=1",
        "learner.lr=0.05",
        "learner.backbone_lr=0.003",
        "learner.batch_size=16",
        "learner.momentum=0.9",
    ),
    "cls_er": (
        "learner.updates=2",
        "learner.strength=2",
        "learner.plastic_rate=1",
        "learner.stable_rate=0.9",
        "learner.stable_decay=0.9",
    ),
    "coda_prompt": ("learner.lr=0.01", "learner.batch_size=16"),
    "cofima": ("learner.batch_size=16", "learner.slow=0.5", "learner.share=0.3"),
    "cotta": ("learner.augmentations=2", "learner.batch_size=16"),
    "der_expand": ("learner.lr=0.01", "learner.batch_size=16"),
    "derpp": ("learner.batch_size=16",),
    "dsal": ("learner.projection=100", "learner.compensation=2"),
    "dst": ("scenario=til_digits", "learner.lr=3e-4", "learner.batch_size=16", "learner.density=0.8", "learner.interval=2"),
    "dualprompt": ("learner.batch_size=16", "learner.lr=0.01"),
    "ease": ("learner.pet.scale=1", "learner.lr=0.5", "learner.batch_size=8"),
    "eata": ("learner.batch_size=16", "learner.adapt_lr=0.02", "learner.fisher=100"),
    "er": ("learner.updates=2",),
    "er_ace": ("learner.lr=0.02", "learner.batch_size=4"),
    "ewc": ("learner.strength=1e6", "learner.lr=2e-3", "learner.backbone_lr=5e-4", "learner.batch_size=16"),
    "ewc_online": ("learner.strength=1e5", "learner.lr=2e-3", "learner.backbone_lr=5e-4", "learner.batch_size=16"),
    "fast_slow": ("learner.lr=0.02", "learner.backbone_lr=0.003", "learner.batch_size=16", "learner.strength=1e3"),
    "feat_kd": ("learner.lr=2e-3", "learner.backbone_lr=5e-4", "learner.batch_size=16"),
    "fetril": ("learner.lr=0.003", "learner.batch_size=16", "learner.head_epochs=10"),
    "finetune": ("learner.batch_size=16",),
    "focal_kd": ("learner.batch_size=16", "learner.base=3"),
    "foster": ("learner.lr=0.02", "learner.batch_size=8"),
    "gdumb": ("learner.passes=8",),
    "gem": ("learner.lr=0.005",),
    "gpm": ("scenario=til_digits", "learner.energy=0.7", "learner.batch_size=16"),
    "gkeal": ("learner.projection=50", "learner.ridge=1"),
    "hat": ("scenario=til_digits", "learner.batch_size=16"),
    "homeostatic": ("learner.lr=0.005", "learner.step=0.5", "learner.recent=10"),
    "hypernetwork": ("scenario=til_digits", "model=mlp", "learner.lr=3e-3", "learner.batch_size=8"),
    "hdc": ("learner.width=512",),
    "icarl": ("learner.batch_size=16",),
    "icl": ("learner.projection=300",),
    "incremental_frozen": ("learner.lr=0.003", "learner.batch_size=16"),
    "inflora": ("learner.lr=0.01", "learner.batch_size=16", "learner.energy=0.5"),
    "isolated": ("scenario=til_digits",),
    "klda": ("learner.projection=60", "learner.sigma=0.01"),
    "l2_init": ("learner.backbone_lr=5e-4", "learner.batch_size=16"),
    "l2_reg": ("learner.lr=2e-3", "learner.backbone_lr=5e-4", "learner.batch_size=16"),
    "l2p": ("learner.lr=0.005",),
    "l2p_pp": ("learner.lr=0.01", "learner.batch_size=16"),
    "lae": ("learner.lr=0.005", "learner.batch_size=16"),
    "laftr": ("model=mlp", "learner.batch_size=16"),
    "lame": ("learner.batch_size=16",),
    "losse_ftl": ("learner.grids=12", "learner.bins=4"),
    "lucir": ("learner.eta=10", "learner.batch_size=16"),
    "lwf": ("learner.batch_size=16",),
    "mir": ("learner.candidates=20",),
    "macil": ("learner.batch_size=8", "learner.pairs=10", "learner.patches=4"),
    "mas": ("learner.strength=100", "learner.lr=2e-3", "learner.backbone_lr=5e-4", "learner.batch_size=16"),
    "merge": ("learner.batch_size=16", "learner.backbone_lr=0.01", "learner.operator=ties"),
    "memo": ("learner.lr=0.01", "learner.batch_size=16"),
    "model_zoo": ("scenario=til_digits", "learner.tasks_per_round=2"),
    "mos": ("learner.pet.scale=1", "learner.lr=1", "learner.batch_size=16", "learner.align_epochs=5"),
    "online_ensemble": ("learner.members=32", "learner.chosen=4", "learner.keys=fixed", "learner.epsilon=0.01"),
    "onpro": ("learner.lr=0.03", "learner.batch_size=12", "learner.replay=16", "learner.mix_p=0.5", "learner.base_rate=0.7"),
    "ovor": ("learner.lr=0.01", "learner.batch_size=16"),
    "packnet": ("scenario=til_digits", "learner.lr=0.01", "learner.retrain_lr=0.003", "learner.batch_size=16"),
    "pass": ("learner.batch_size=16",),
    "par": ("scenario=til_digits", "learner.reuse=1", "learner.batch_size=16"),
    "picle": ("scenario=til_digits", "model=mlp", "learner.modules=2", "learner.lr=0.01", "learner.batch_size=4"),
    "pred_kd": ("learner.lr=5e-4", "learner.backbone_lr=5e-4", "learner.batch_size=16"),
    "psmt": ("learner.batch_size=16", "learner.fisher=100"),
    "randumb": ("learner.projection=100",),
    "rank_updates": ("scenario=til_digits", "model=mlp", "learner.lr=0.01", "learner.batch_size=4"),
    "ranpac": ("learner.pet.scale=1", "learner.lr=1", "learner.batch_size=16", "learner.projection=1000"),
    "rehearsal_free": ("learner.lr=5e-4", "learner.backbone_lr=5e-4", "learner.batch_size=16"),
    "replay": ("learner.batch_size=16",),
    "rsiat": ("learner.batch_size=8", "learner.rs_warmup=2"),
    "rwalk": (
        "learner.strength=1e4",
        "learner.lr=2e-3",
        "learner.backbone_lr=5e-4",
        "learner.batch_size=16",
        "learner.interval=2",
    ),
    "sar": ("learner.batch_size=16", "learner.adapt_lr=1", "learner.margin=0.6", "learner.variant=official"),
    "s_prompts": ("learner.lr=0.5", "learner.batch_size=16"),
    "sd_lora": ("learner.lr=0.1", "learner.batch_size=16"),
    "seed_ensemble": ("learner.lr=0.01", "learner.batch_size=16", "learner.experts=2"),
    "sfr": ("model=mlp", "learner.lr=0.003", "learner.backbone_lr=0.003", "learner.batch_size=16"),
    "shrink_perturb": ("learner.batch_size=16", "learner.shrink=0.9", "learner.sigma=0.001"),
    "si": (
        "learner.strength=1e4",
        "learner.damping=1e-3",
        "learner.lr=2e-3",
        "learner.backbone_lr=5e-4",
        "learner.batch_size=16",
    ),
    "simplex": ("learner.batch_size=16", "learner.backbone_lr=0.005"),
    "slca": ("learner.batch_size=16",),
    "slca_pp": ("learner.lr=0.02", "learner.slow=0.3", "learner.batch_size=16"),
    "sldc": ("learner.lr=3e-3", "learner.head_lr=0.03", "learner.align_samples=128"),
    "sparse_mask": ("learner.batch_size=16", "learner.share=0.05", "learner.backbone_lr=0.005"),
    "ssiat": ("learner.batch_size=16",),
    "tag": ("scenario=til_digits", "learner.lr=2e-5", "learner.batch_size=16"),
    "tent": ("learner.batch_size=16", "learner.adapt_lr=0.03"),
    "tuna": ("learner.pet.scale=1", "learner.lr=0.3", "learner.align_epochs=5"),
    "vida": (
        "learner.batch_size=16",
        "learner.augmentations=2",
        "learner.adapt_lr=1e-3",
        "learner.adapter_lr=1e-3",
        "learner.lr=0.03",
    ),
    "wa": ("learner.batch_size=16",),
}
VARIANTS = {  # of learners of images: with what they differ from the default
    "derpp-online": ("learner.online=true",),
    "dualprompt-compat_reshape": ("learner.compat_reshape=true",),
    "ewc-batch": ("learner.fisher=batch", "learner.strength=1e6"),
    "fecam-pilot": ("learner.variant=pilot",),
    "figmn-published": ("learner.variant=published",),
    "finetune-adalora": ("pet=adalora", "learner.backbone_lr=1.6"),
    "finetune-corda": ("pet=corda", "learner.backbone_lr=1.0"),
    "finetune-dora": ("pet=dora", "learner.backbone_lr=0.05"),
    "finetune-lora": ("pet=lora", "learner.backbone_lr=0.01"),
    "er_ace-official": ("learner.variant=official",),
    "gem-paper": ("learner.variant=paper",),
    "icarl-linear": ("learner.answer=linear",),
    "icarl-online": ("learner.online=true", "learner.lr=0.02"),
    "incremental_frozen-tricks": (
        *("learner.supcon=0.5", "learner.mirror=false", "learner.virtual=3", "learner.rotation=0.5"),
        *("learner.etf=10", "learner.finetune=2", "learner.subnet=0.5"),
    ),
    "joint-probe": ("learner.mode=probe",),
    "l2p-batchwise": ("learner.batchwise_prompt=true",),
    "lae-prefix": ("pet=prefix_lae",),
    "mos-official_raw": ("learner.variant=official_raw",),
    "mos-paper": ("learner.variant=paper",),
    "ncm-cosine": ("learner.metric=cosine",),
    "scr-official": ("learner.variant=official", "learner.review=true"),
    "slda-official": ("learner.variant=official",),
}
NEAR = {  # rows of one method that are equal within the tolerances
    ("dualprompt", "dualprompt-compat_reshape"),
    ("er_ace", "er_ace-official"),
    ("mos", "mos-official_raw"),
    ("scr", "scr-official"),
}


def cases():
    """Stream and name of a case -> its overrides: every learner on every stream that asks what it answers."""
    made, kinds = {}, {"predict": ("images",), "loss": ("tokens", "masked"), "logits": ("edits",), "next_token": ("texts",)}
    for name in choices("learner"):
        for stream in kinds[asks("learner", name)]:
            own = OPTIONS.get(name, ()) if stream == "images" else ()
            made[stream, name] = (*STREAMS[stream], f"learner={name}", *own)
    for name, options in VARIANTS.items():
        made["images", name] = (*made["images", name.partition("-")[0]], *options)
    return made


CASES = cases()


def golden(stream):
    """The rows of a stream that are kept."""
    path = FOLDER / f"{stream}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def keep(stream, name, row):
    """Write one row, a line each; rows of no case go."""
    with FileLock(pathlib.Path(tempfile.gettempdir()) / "clbench-golden.lock"):
        rows = {key: value for key, value in (golden(stream) | {name: row}).items() if (stream, key) in CASES}
        lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(rows.items()))
        (FOLDER / f"{stream}.json").write_text("{\n" + lines + "\n}\n")


def run(folder, monkeypatch, *overrides):
    """A run in this process -> its record and the learner's final state."""
    monkeypatch.setenv("CLBENCH_CACHE", str(folder / "cache"))
    (job,) = compose.compose([*EXACT, *overrides, f"results_dir={folder}"])
    learners, target = [], load_target(job["learner"]["_target_"])
    begin = target.__init__

    @functools.wraps(begin)
    def kept(self, *args, **options):
        learners.append(self)
        begin(self, *args, **options)

    monkeypatch.setattr(target, "__init__", kept)
    outcome = run_job(job)
    assert outcome.status == "ok" and outcome.path is not None, outcome.text
    return record.read(outcome.path), learners[-1].state_dict()


@pytest.mark.parametrize(("stream", "name"), CASES, ids=["-".join(case) for case in CASES])
def test_numbers(tmp_path, monkeypatch, request, record_property, stream, name):
    row = row_of(*run(tmp_path, monkeypatch, *CASES[stream, name]))
    if request.config.getoption("--update-golden"):
        keep(stream, name, row)
        return
    old = golden(stream).get(name)
    assert old, f"no golden row of {name}: run pytest tests/test_golden.py --update-golden -k {stream}-{name}"
    exact = old["made_on"] == row["made_on"]
    record_property("golden", "to the last bit" if exact else f"within tolerances: made on {old['made_on']}")
    found = differences(old, row, exact)
    assert not found, "\n".join(found)


def test_every_run_has_a_row():
    assert {(stream, name) for stream in STREAMS for name in golden(stream)} == set(CASES)


def same(old, new):
    """Could two rows stand for each other on another kind of processor, by the main matrix alone?"""
    field = next(name for name in ("edit_nats", "correct", "sum_loss") if name in old)
    a, b = numbers(old[field]), numbers(new[field])
    return all(near(a[key], b[key], field == "correct") for key in a)


@pytest.mark.parametrize("stream", STREAMS)
def test_no_two_learners_share_a_row(stream):
    rows = golden(stream)
    near = {pair for pair in itertools.combinations(sorted(rows), 2) if same(*(rows[name] for name in pair))}
    assert near == {pair for pair in NEAR if rows.keys() >= set(pair)}
    assert all(rows[a]["correct"] != rows[b]["correct"] for a, b in near)


@pytest.mark.parametrize("stream", STREAMS)
def test_rates_train(stream):
    """The newest classes are learned at twice the rate of guessing; the loss of the first domain falls by a tenth, that of the
    first edit's answer by a half, that of the facts among text tasks by a half."""
    for name, row in golden(stream).items():
        if stream == "images":
            seen = [4, 7, 10]
            lifts = [row["correct"][i][i] / row["n"][i] * seen[i] for i in range(3)]
            assert np.mean(lifts) > 2, f"{name}: {lifts} times the rate of guessing"
        elif stream == "edits" and name not in (
            "emmet",
            "encore",
            "memit",
            "rome",
        ):  # closed forms: four edits in a row may fail
            assert row["edit_nats"]["edit_success 1"][0] < 0.5 * row["edit_nats"]["edit_success -1"][0], name
        elif stream == "texts":
            assert row["edit_nats"]["answers 1"][1] < 0.5 * row["edit_nats"]["answers -1"][1], name
        elif stream != "edits":
            assert row["sum_loss"][0][0] < 0.9 * row["sum_loss_start"][0], name


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Record and final state of a short run."""
    return run(tmp_path, monkeypatch, *CASES["tokens", "frozen"])


def with_state(finished, state):
    """The row of a finished run that ended in another state."""
    return row_of({**finished, "final_state_sha256": fingerprint(state)}, state)


def test_one_bit_of_one_final_tensor_is_noticed(finished):
    finished, state = finished
    row = row_of(finished, state)
    assert differences(row, with_state(finished, copy.deepcopy(state)), exact=True) == []
    places = [path for path, leaf in numbers(state).items() if isinstance(leaf, torch.Tensor) and leaf.numel()]
    assert len(places) > 60  # weights and both moments of the optimiser
    for number, path in enumerate(places):
        other = copy.deepcopy(state)
        changed = numbers(other)[path].detach()  # shares its memory with the state
        content = changed.reshape(-1).view(torch.uint8).numpy()
        content[number % len(content)] ^= 1 << number % 8
        (line,) = differences(row, with_state(finished, other), exact=True)
        assert line.startswith(f"tensors moved: {str(changed.dtype)[6:]}")


def test_renamed_keys_are_told_from_moved_numbers(finished):
    finished, state = finished
    weights = dict(reversed(state["model"].items()))
    rest = [value for name, value in state.items() if name != "model"]
    renamed = {"network": {f"module.{name}": value for name, value in weights.items()}, "rest": rest}
    lines = differences(row_of(finished, state), with_state(finished, renamed), exact=True)
    assert len(lines) == 1 and lines[0].startswith("names moved")
    state["model"].popitem()
    assert differences(with_state(finished, renamed), with_state(finished, state), exact=True)[0].startswith("tensors moved")


def test_command_line_ends_where_this_process_does(clbench, finished):
    clbench("run", *EXACT, *CASES["tokens", "frozen"])
    (found,) = clbench.records()
    assert found["final_state_sha256"] == finished[0]["final_state_sha256"] and found["sum_loss"] == finished[0]["sum_loss"]


def test_tolerances():
    old = golden("images")["slca"]
    new = copy.deepcopy(old)
    new["correct"][2][1] += IMAGES
    new["final_state_sha256"] = "0" * 64
    assert differences(old, new, exact=False) == []
    assert len(differences(old, new, exact=True)) == 2
    new["correct"][2][1] += 1
    assert differences(old, new, exact=False) == [
        f"numbers moved: correct[2][1] {old['correct'][2][1]} -> {old['correct'][2][1] + 3}"
    ]
    new["correct"] = new["correct"][:2]
    assert differences(old, new, exact=False) == ["correct has another form"]
    assert differences(old, {**old, "manifest": "0"}, exact=False) == ["another stream"]
    losses = golden("tokens")["ema"]
    for share, number in ((RELATIVE / 2, 0), (RELATIVE * 2, 1)):
        new = copy.deepcopy(losses)
        new["sum_loss"][0][0] *= 1 + share
        assert len(differences(losses, new, exact=False)) == number
        assert len(differences(losses, new, exact=True)) == 1


def test_kept_rows_name_the_processor_that_made_them():
    kind = machine_kind()
    assert torch.backends.cpu.get_cpu_capability() in kind and torch.__version__.startswith(kind.rpartition(" ")[2])
    with pytest.raises(AssertionError, match="not ndarray"):
        tensors_by_shape({"memory": [np.zeros(3)]})
    assert tensors_by_shape([torch.zeros(2), {"a": torch.zeros(2)}, torch.tensor(1)]).keys() == {"float32 2", "int64"}
