"""Loads the weights of a model: finds the file, checks it, fills it in. Nothing is guessed."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from clbench.interfaces import UserError
from clbench.models import weight_names

log = logging.getLogger("clbench")
HERE = pathlib.Path(__file__).resolve().parent
CONTAINERS = (  # where checkpoints keep their tensors, looked for in this order
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "state_dict_ema",
    "model_ema",
    "ema",
    "backbone",
    "encoder",
    "teacher",
    "student",
    "module",
)


def find(weights: str, tag: str, data_root: str | None) -> pathlib.Path:
    """A weights file: in this package, as given, or under `data_root` (else CLBENCH_DATA). Missing: `UserError`."""
    if weights.startswith("package:"):
        path = HERE / weights.removeprefix("package:")
        if path.parent != HERE or not path.is_file():
            inside = ", ".join(f"package:{p.name}" for p in sorted(HERE.glob("*.safetensors")))
            raise UserError(f"model.weights={weights}: clbench ships {inside}")
        return path
    root = data_root or os.environ.get("CLBENCH_DATA")
    places = [pathlib.Path(weights).expanduser()] + ([pathlib.Path(root).expanduser() / weights] if root else [])
    for path in places:
        if path.is_file():
            return path
    looked = " and ".join(str(p) for p in places)
    where = "" if root else " (no data_root, CLBENCH_DATA is not set)"
    raise UserError(
        f"weights file {weights} not found: looked for {looked}{where}; it holds timm's {tag}; "
        "model.weights=FILE names it, model.weights=timm download=true fetches timm's own"
    )


def cached(tag: str) -> pathlib.Path | None:
    """The file that timm has already downloaded for a full tag, without asking the network; None where there is none."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    config = timm.models.get_pretrained_cfg(tag)
    if config is None:
        return None
    names = (config.hf_hub_filename, "model.safetensors", "pytorch_model.bin") if config.hf_hub_id else ()
    for name in filter(None, names):
        found = try_to_load_from_cache(str(config.hf_hub_id), name)
        if isinstance(found, str):
            return pathlib.Path(found)
    url = str(config.url or "")
    path = pathlib.Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    return path if url and path.is_file() else None


def check_sha256(path: pathlib.Path, expected: str | None) -> str:
    """SHA-256 of a file; `UserError` where another one is expected."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if expected is not None and expected.lower() != found:
        raise UserError(f"weights {path} have SHA-256 {found}, expected {expected}")
    return found


def fill(net: nn.Module, path: pathlib.Path, name: str) -> None:
    """Load a file into `net`: safetensors, a pickle of tensors only, or a Google `.npz`. Its classifier is left out.

    Names are taken as public files have them (`weight_names`); the log says what was read where and what was left out, the
    `UserError` of a file that does not fit says what fits and what does not.
    """
    if path.suffix == ".npz":
        return _fill_npz(net, path, name)
    given, told = _read(path)
    wanted = net.state_dict()
    given, done = weight_names.in_timm_names(given, wanted.keys())
    told += done
    left = sorted(k for k in given if k not in wanted and weight_names.left_out(k))
    given = {k: v.float() if v.is_floating_point() else v for k, v in given.items() if k not in left}
    missing, extra = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or extra:
        detail = "; ".join(f"{word} {_some(keys)}" for word, keys in (("missing", missing), ("unexpected", extra)) if keys)
        fits = f"{len(wanted) - len(missing)} of the model's {len(wanted)} tensors are there"
        raise UserError(f"weights {path} do not fit model {name}: {detail} ({'; '.join([fits, *told])})")
    if "pos_embed" in given:
        given["pos_embed"] = _positions(net, given["pos_embed"], wanted["pos_embed"])
    for key, value in given.items():
        if value.shape != wanted[key].shape:
            shapes = f"{key} is {tuple(value.shape)}, the model wants {tuple(wanted[key].shape)}"
            raise UserError(f"weights {path} do not fit model {name}: {shapes}")
    _check_finite(given.items(), path)
    net.load_state_dict(given)
    if told or any(not k.startswith(weight_names.HEADS) for k in left):
        told += [f"{_some(left)} left out"] if left else []
        log.info("weights %s fit model %s: %d tensors; %s", path.name, name, len(given), "; ".join(told))


def _positions(net: Any, given: Tensor, wanted: Tensor) -> Tensor:
    """A ViT's position embedding, resampled to another image size as timm does on loading (bicubic, antialiased)."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    grid = getattr(getattr(net, "patch_embed", None), "grid_size", None)
    prefix = 0 if getattr(net, "no_embed_class", False) else int(getattr(net, "num_prefix_tokens", 0))
    square = math.isqrt(max(0, given.shape[1] - prefix)) if given.dim() == 3 else 0
    fits = given.dim() == 3 and given.shape[2] == wanted.shape[2] and square * square == given.shape[1] - prefix > 0
    if given.shape == wanted.shape or grid is None or not fits:
        return given
    return resample_abs_pos_embed(given, list(grid), num_prefix_tokens=prefix)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _check_finite(items: Iterable[tuple[str, Tensor]], path: pathlib.Path) -> None:
    for key, value in items:
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"weights {path}: {key} holds NaN or infinite values")


def _read(path: pathlib.Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file by name, and what it says about where they lay."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # corrupt files raise many kinds
        raise UserError(_unread(path, error)) from None
    inside: list[str] = []
    while (name := _container(state)) is not None:
        state = state[name]
        inside.append(name)
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        held = f": it holds {_some([str(key) for key in state])}" if isinstance(state, dict) and state else ""
        raise UserError(f"weights {path} are not a mapping of names to tensors{held}")
    return state, [f"read under {' / '.join(inside)}"] if inside else []


def _container(state: Any) -> str | None:
    """The entry of a checkpoint that holds its tensors; None where these lie in it, or where none is known."""
    if not isinstance(state, dict) or not state or all(isinstance(value, Tensor) for value in state.values()):
        return None
    return next((name for name in CONTAINERS if isinstance(state.get(name), dict) and state[name]), None)


def _unread(path: pathlib.Path, error: Exception) -> str:
    """Why a file cannot be read: damaged, or a pickle of more than tensors, which is never unpickled."""
    try:
        objects = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # no checkpoint at all, or an older torch
        objects = re.findall(r"GLOBAL (\S+) was not", str(error))
    if not objects:
        return f"weights {path} cannot be read: {line(error)}"
    save = f"torch.save(torch.load('{path.name}', weights_only=False)['model'], 'tensors.pth')"
    return (
        f"weights {path} hold the Python object {_some(sorted(objects))}, and such files are never unpickled; "
        f"if you trust it, save its tensors alone: {save}, or another entry than 'model' that holds them"
    )


def _fill_npz(net: Any, path: pathlib.Path, name: str) -> None:
    if not hasattr(net, "load_pretrained"):
        raise UserError(f"weights {path}: timm reads .npz files for vision transformers, not for model {name}")
    try:
        net.load_pretrained(str(path))
    except Exception as error:  # a foreign or damaged archive raises many kinds
        raise UserError(f"weights {path} do not fit model {name}: {line(error)}") from None
    _check_finite(net.state_dict().items(), path)


def line(error: Exception) -> str:
    """The first line of an error, for a message of one line."""
    return (re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() or [type(error).__name__])[0][:120]


def state_sha256(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a state, in the order of the names."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
