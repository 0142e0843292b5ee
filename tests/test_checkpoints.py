"""Files of weights as others write them: wrappers' prefixes, containers, training states, objects that are never unpickled."""

import argparse
import copy
import logging

import pytest
import torch

from clbench.interfaces import UserError
from clbench.models.backbone import build_backbone
from clbench.models.weights import line

KWARGS = {"maps": [2], "hidden": 3, "img_size": 4}


def small(weights="none", **more):
    return build_backbone("small", "convnet", KWARGS, weights, profile="small", **more)


@pytest.fixture
def state():
    return {name: value.clone() for name, value in small(seed=5).net.state_dict().items()}


def read(path, state, caplog):
    """Load a file, see that it is `state` -> what was said about it."""
    caplog.set_level(logging.INFO, logger="clbench")
    caplog.clear()
    model = small(str(path))
    found = model.net.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    return " ".join(record.getMessage() for record in caplog.records)


CONTAINERS = [
    "state_dict",
    "model",
    "model_state_dict",
    "net",
    "state_dict_ema",
    "model_ema",
    "ema",
    "teacher",
    "student",
    "encoder",
]


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "model.", "_orig_mod.", "module.model.", "encoder.net."])
@pytest.mark.parametrize("container", ["", *CONTAINERS])
def test_known_containers_and_prefixes(tmp_path, state, caplog, container, prefix):
    named = {f"{prefix}{name}": value for name, value in state.items()}
    torch.save({container: named, "epoch": 3, "lr": 0.1} if container else named, tmp_path / "w.pth")
    said = read(tmp_path / "w.pth", state, caplog)
    assert (f"read under {container}" in said) == bool(container) and (f"names without '{prefix}'" in said) == bool(prefix)
    assert said.startswith(f"weights w.pth fit model small: {len(state)} tensors; ") if container or prefix else said == ""


def test_containers_in_containers_and_heads_beside(tmp_path, state, caplog):
    inner = {f"module.backbone.{name}": value for name, value in state.items()} | {"module.fc.weight": torch.zeros(7, 3)}
    torch.save({"model": {"state_dict": inner}, "optimizer": {"state": {}}}, tmp_path / "w.pth")
    assert "names without 'module.backbone.'; fc.weight left out" in read(tmp_path / "w.pth", state, caplog)
    torch.save({"model": inner | {"module.adapter.weight": torch.zeros(2)}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"do not fit model small: unexpected adapter\.weight \("):
        small(str(tmp_path / "w.pth"))
    inner = {f"module.{name}": value for name, value in state.items()} | {"module.fc.weight": torch.zeros(7, 3)}
    torch.save({"model": {"state_dict": inner}, "optimizer": {"state": {}}}, tmp_path / "w.pth")
    said = read(tmp_path / "w.pth", state, caplog)
    assert "read under model / state_dict; names without 'module.'; fc.weight left out" in said


def test_averaged_and_compiled_models(tmp_path, state, caplog):
    """torch's own wrappers write what is read."""
    net = small(seed=5).net
    torch.save(torch.optim.swa_utils.AveragedModel(net).state_dict(), tmp_path / "average.pth")
    assert "n_averaged left out" in read(tmp_path / "average.pth", state, caplog)
    torch.save(torch.nn.DataParallel(copy.deepcopy(net)).state_dict(), tmp_path / "parallel.pth")
    assert "names without 'module.'" in read(tmp_path / "parallel.pth", state, caplog)


def test_the_plain_weights_come_before_the_averaged_ones(tmp_path, state, caplog):
    other = {name: value + 1 for name, value in state.items()}
    torch.save({"state_dict_ema": other, "state_dict": state}, tmp_path / "w.pth")
    assert "read under state_dict;" in read(tmp_path / "w.pth", state, caplog) + ";"


def test_two_tensors_of_one_name_are_not_merged(tmp_path, state):
    torch.save({**{f"module.{n}": v for n, v in state.items()}, "dense.bias": state["dense.bias"] + 1}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"do not fit model small: missing .*; unexpected module"):
        small(str(tmp_path / "w.pth"))


class Touched:
    """Unpickling it would leave a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_objects_are_named_and_never_unpickled(tmp_path, state):
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "with_args.pth")
    with pytest.raises(UserError) as error:
        small(str(tmp_path / "with_args.pth"))
    said = str(error.value)
    assert said.startswith(
        f"weights {tmp_path}/with_args.pth hold the Python object argparse.Namespace, and such files are never"
    )
    command = said.partition("save its tensors alone: ")[2].partition(", or another entry")[0]
    assert "\n" not in said and "\x1b" not in said
    torch.save({"model": state, "args": Touched(tmp_path / "touched")}, tmp_path / "code.pth")
    with pytest.raises(UserError, match=r"hold the Python object .*open, and such files are never unpickled"):
        small(str(tmp_path / "code.pth"))
    assert not (tmp_path / "touched").exists()
    import os

    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        exec(command, {"torch": torch})
        assert torch.equal(small("tensors.pth").net.state_dict()["dense.bias"], state["dense.bias"])
    finally:
        os.chdir(before)


def test_what_holds_no_weights_says_what_it_holds(tmp_path):
    torch.save({"optimizer": {"lr": 0.1}, "epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth are not a mapping of names to tensors: it holds optimizer, epoch$"):
        small(str(tmp_path / "w.pth"))


def test_a_line_of_an_error_has_no_escape_codes():
    assert line(ValueError("\x1b[1mbold\x1b[0m words\nmore")) == "bold words" and line(ValueError()) == "ValueError"
