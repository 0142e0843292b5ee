"""Checkpoints of GPT-NeoX models, such as Pythia's, from a folder: config.json and safetensors, in one file or several."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clbench.interfaces import UserError
from clbench.models.weights import line

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_BUFFERS = (".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq")


def find(weights: str, data_root: str | None) -> Path:
    """The folder of a checkpoint: as given, or under `data_root` (else CLBENCH_DATA). Missing: `UserError`."""
    root = data_root or os.environ.get("CLBENCH_DATA")
    places = [Path(weights).expanduser()] + ([Path(root).expanduser() / weights] if root else [])
    for path in places:
        if path.is_dir():
            return path
        if path.is_file():
            raise UserError(f"model.weights={weights} is a file: a folder with config.json and safetensors is needed")
    where = "" if root else " (no data_root, CLBENCH_DATA is not set)"
    raise UserError(
        f"no folder {' or '.join(map(str, places))}{where}: model.weights names a folder with config.json and {SINGLE}, "
        "as huggingface.co/EleutherAI offers for Pythia; model.weights=none draws random ones"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; anything else raises `UserError`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {line(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def shape_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's config.json says about the numbers that `decoder.Shape` is made of, in its words."""
    rope = config.get("rope_parameters") or {}
    width = config.get("hidden_size")
    return {
        "vocab": config.get("vocab_size"),
        "width": width,
        "depth": config.get("num_hidden_layers"),
        "heads": config.get("num_attention_heads"),
        "context": config.get("max_position_embeddings", 2048),
        "hidden": config.get("intermediate_size", 4 * width if isinstance(width, int) else None),
        "rotary": rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25)),
        "rotary_base": rope.get("rope_theta", config.get("rotary_emb_base", 10_000)),
        "parallel": config.get("use_parallel_residual", True),
        "tied": config.get("tie_word_embeddings", False),
        "eps": config.get("layer_norm_eps", 1e-5),
        "activation": config.get("hidden_act", "gelu"),
    }


def config_of(shape: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a decoder's shape, as `shape_of` reads it."""
    return {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": shape["vocab"],
        "hidden_size": shape["width"],
        "num_hidden_layers": shape["depth"],
        "num_attention_heads": shape["heads"],
        "max_position_embeddings": shape["context"],
        "intermediate_size": shape["hidden"],
        "rotary_pct": shape["rotary"],
        "rotary_emb_base": shape["rotary_base"],
        "use_parallel_residual": shape["parallel"],
        "tie_word_embeddings": shape["tied"],
        "layer_norm_eps": shape["eps"],
        "hidden_act": shape["activation"],
    }


def check_config(folder: Path, shape: Mapping[str, Any]) -> None:
    """Compare a checkpoint's config.json with the shape that was asked for; `UserError` with all differences.

    A context shorter than the checkpoint's is fine: positions are turned, not stored.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") != "gpt_neox":
        raise UserError(f"{folder} holds a model of type {config.get('model_type')!r}, not gpt_neox")
    scaled = config.get("rope_scaling") or (config.get("rope_parameters") or {}).get("rope_type", "default") != "default"
    if scaled or not config.get("attention_bias", True):
        raise UserError(f"{folder}: scaled rotary positions and attention without biases are not supported")
    found = shape_of(config)
    differs = [
        f"{name} is {found[name]}, model.{name} is {value}"
        for name, value in shape.items()
        if (found[name] < value if name == "context" and isinstance(found[name], int) else found[name] != value)
    ]
    if differs:
        raise UserError(f"the checkpoint in {folder} has another shape: {'; '.join(differs)}")


def parts(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; a missing one raises `UserError`."""
    if (folder / INDEX).is_file():
        mapping = read_json(folder / INDEX).get("weight_map")
        names = sorted({str(v) for v in mapping.values()}) if isinstance(mapping, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise UserError(f"{folder / INDEX} names no files")
        files = [folder / name for name in names]
    else:
        files = [folder / SINGLE]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        pickled = list(folder.glob("pytorch_model*.bin"))
        hint = f"; {pickled[0].name} is a pickle, which is not read: save it as safetensors" if pickled else ""
        raise UserError(f"the checkpoint in {folder} lacks {', '.join(missing)}{hint}")
    return files


def fill(model: nn.Module, folder: Path, tied: bool) -> str:
    """Fill a decoder with a checkpoint, strictly -> SHA-256 over its files' own, in the order of their names."""
    digest, filled = hashlib.sha256(), set[str]()
    for path in parts(folder):
        filled |= _fill(model, path)
        with path.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    _check_whole(model, filled, tied, folder)
    return digest.hexdigest()


def fill_from(model: nn.Module, path: Path, tied: bool) -> None:
    """Fill a decoder with one file of tensors, strictly."""
    _check_whole(model, _fill(model, path), tied, path)


def _fill(model: nn.Module, path: Path) -> set[str]:
    """Copy the tensors of a file into a model -> its names for them."""
    from safetensors import SafetensorError, safe_open

    wanted, filled = model.state_dict(), set[str]()
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                if not key.endswith(_BUFFERS):
                    filled.add(_fill_one(wanted, key, file.get_tensor(key), path))
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read: {line(error)}") from None
    return filled


def _check_whole(model: nn.Module, filled: set[str], tied: bool, where: Path) -> None:
    """Every tensor of the model was filled; of tied embeddings one is enough."""
    if tied and filled & {"embed_in.weight", "embed_out.weight"}:
        filled = filled | {"embed_in.weight", "embed_out.weight"}
    missing = sorted(model.state_dict().keys() - filled)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"the checkpoint in {where} lacks {', '.join(missing[:3])}{more}")


def _fill_one(wanted: Mapping[str, Tensor], key: str, value: Tensor, path: Path) -> str:
    """Copy one tensor of a file into the model's state -> the model's name for it."""
    name = key.removeprefix("gpt_neox.").replace("lm_head.", "embed_out.")
    if name not in wanted:
        raise UserError(f"{path} holds {key}, which a GPT-NeoX decoder of this shape does not have")
    if value.shape != wanted[name].shape:
        raise UserError(f"{path}: {key} is {tuple(value.shape)}, the model wants {tuple(wanted[name].shape)}")
    if not torch.isfinite(value).all():
        raise UserError(f"{path}: {key} holds NaN or infinite values")
    wanted[name].copy_(value)
    return name
