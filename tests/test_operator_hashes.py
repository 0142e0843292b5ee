"""The hash of a stream under every operator, committed: the same on any machine.

`pytest tests/test_operator_hashes.py --update-golden` writes it anew; a new hash means other streams than those of old records.
"""

import json
import pathlib

import numpy as np
import pytest

from clbench.streams import generators
from clbench.streams.operators import registry

FILE = pathlib.Path(__file__).parent / "golden" / "operators.json"
CHAINS = [
    [{"permute": {"experiences": 3}}],
    [{"rotate": {"experiences": 3}}, "single_pass"],
    [{"corrupt": {"kinds": ["fog", "jpeg_compression"], "severity": 3}}],
    [{"corrupt": {"order": 2}}, {"test_time": {"batch_size": 10, "order": "sorted"}}],
    [{"relabel": {"experiences": 3, "rate": [0.5, 1]}}],
    [{"long_tail": {"ratio": 0.1, "order": "shuffled"}}],
    [{"label_noise": {"share": 0.2}}, "shuffle"],
    [{"shots": {"base": 6, "way": 2, "shot": 5}}],
    [{"blur": {"blurred": 30}}, "single_pass", "hide_boundaries"],
    [{"blur": {"stochastic": True}}],
    [{"repeat": {"experiences": 8, "classes": 3}}],
    [{"repeat": {"how": "sampling", "experiences": 9, "samples": 30}}],
    [{"repeat": {"how": "tasks", "experiences": 40, "samples": 3}}, {"evaluate": {"every": 8}}],
    [{"mnist_360": {"classes": 4, "rounds": 2}}, {"single_pass": {"shuffle": False}}],
    [{"bell": {"sequence": "in"}}],
    [{"drift": {"width": 0.5}}, {"looks": {"number": 3}}],
    [{"order": {"by": "edge_hard"}}],
    [{"order": {"of": "experiences", "by": "hard_first"}}, {"evaluators": {"names": ["confusion"]}}],
    [{"file_lists": {"folder": "lists", "run": 0}}],
    [{"concatenate": {"datasets": ["other.npz"], "increment": 2}}],
]


def test_every_operator_is_there():
    assert {next(iter(one)) if isinstance(one, dict) else one for chain in CHAINS for one in chain} == set(registry.BUILT_IN)


def listed_folder(root):
    """Two classes of two training images and one test image, grey and of equal bytes everywhere, and two lists of them."""
    lines = {0: "", 1: ""}
    for c in range(2):
        for part, k in (("train", 0), ("train", 1), ("test", 0)):
            place = root / "files" / part / f"kind{c}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{k}.pgm").write_bytes(b"P5 3 3 255\n" + bytes([40 * c + 9 * k + i for i in range(9)]))
            if part == "train":
                lines[k] += f"train/kind{c}/{k}.pgm {c}\n"
    run = root / "lists" / "run0"
    run.mkdir(parents=True)
    for k, text in lines.items():
        (run / f"train_batch_0{k}_filelist.txt").write_text(text)
    (run / "test_filelist.txt").write_text("test/kind0/0.pgm 0\ntest/kind1/0.pgm 1\n")
    return root / "files"


def test_hashes_are_the_committed_ones(request, tmp_path):
    rng = np.random.Generator(np.random.Philox(7))
    x, y = rng.integers(0, 256, (24, 9, 7, 3), dtype=np.uint8), np.arange(24) % 4
    np.savez(tmp_path / "other.npz", train_x=x[:16], train_y=y[:16], test_x=x[16:], test_y=y[16:])
    base = generators.class_incremental("hashed", "digits", str(tmp_path), increment=2, limit_train=60, limit_test=10)
    files = generators.class_incremental("hashed", str(listed_folder(tmp_path)), increment=2)
    made = {}
    for chain in CHAINS:
        one = files if "file_lists" in chain[0] else base
        made[json.dumps(chain)] = registry.apply(one, chain, data_root=str(tmp_path)).manifest.sha256
    if request.config.getoption("--update-golden"):
        FILE.write_text(json.dumps(made, indent=1) + "\n")
    if made != json.loads(FILE.read_text()):
        wrong = [chain for chain, found in made.items() if json.loads(FILE.read_text()).get(chain) != found]
        pytest.fail(f"other hashes than committed: {wrong}")
    assert len(set(made.values())) == len(CHAINS)
