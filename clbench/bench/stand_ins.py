"""Random images and weights of the right sizes, for machines that have neither: what is fast does not depend on them."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from clbench.bench.presets import Preset
from clbench.config import compose
from clbench.config.compose import build

CIFAR_LIKE = {"cil_cifar100": (100, 500, 100, 10), "cil_cifar10": (10, 5000, 1000, 2)}  # classes, images each, increment


@contextmanager
def of(preset: Preset, wanted: bool) -> Iterator[Preset]:
    """The preset with data and weights replaced where they are files, for as long as the block runs."""
    if not wanted:
        yield preset
        return
    with tempfile.TemporaryDirectory(prefix="clbench-stand-ins-") as folder:
        where = pathlib.Path(folder)
        overrides = replaced(list(preset.overrides), where)
        base = compose.compose([*overrides, *preset.cases[0].overrides, "model.weights=none"])[0]
        if base["names"].get("model") not in ("nano", "nano_random"):
            overrides.append(f"model.weights='{weights(base['model'], where / 'weights.safetensors')}'")
        yield replace(preset, overrides=tuple(overrides))


def replaced(overrides: list[str], where: pathlib.Path) -> list[str]:
    """A scenario of CIFAR images becomes one of a file of noise that a nearest mean can tell apart."""
    out = []
    for override in overrides:
        name = override.removeprefix("scenario=")
        if override.startswith("scenario=") and name in CIFAR_LIKE:
            k, train, test, increment = CIFAR_LIKE[name]
            path = noise(where / "images.npz", k, train, test, 32)
            out += ["scenario=cil_npz", f"scenario.dataset='{path}'", f"scenario.name={name}_stand_in"]
            out += [f"scenario.increment={increment}", "scenario.budget.epochs=20", "scenario.budget.exemplars=2000"]
        else:
            out.append("scenario.order=natural" if override == "scenario.order=icarl1993" else override)
    return out


def noise(path: pathlib.Path, classes: int, train: int, test: int, side: int) -> pathlib.Path:
    """`train` and `test` images of each class [N, side, side, 3] uint8: a colour of the class and noise."""
    rng = np.random.default_rng(0)
    colours = rng.integers(60, 196, (classes, 1, 1, 3))
    arrays: dict[str, Any] = {}
    for part, count in (("train", train), ("test", test)):
        y = np.arange(classes).repeat(count)
        arrays[f"{part}_y"] = y
        arrays[f"{part}_x"] = np.empty((len(y), side, side, 3), np.uint8)
        for rows in np.array_split(np.arange(len(y)), max(1, len(y) // 4096)):
            arrays[f"{part}_x"][rows] = colours[y[rows]] + rng.integers(-60, 60, (len(rows), side, side, 3))
    np.savez(path, **arrays)
    return path


def weights(node: dict[str, Any], path: pathlib.Path) -> pathlib.Path:
    """The architecture's own random weights as a file."""
    from safetensors.torch import save_file

    model = build({**node, "weights": "none", "sha256": None})
    save_file({name: value.contiguous() for name, value in model.net.state_dict().items()}, str(path))
    return path
