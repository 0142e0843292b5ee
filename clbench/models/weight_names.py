"""What public checkpoints call the tensors of a vision transformer, and what timm calls them.

Three things stand between a file and timm's names. Wrappers and training states put a prefix before them (`PREFIXES`) and
other networks beside them (`BESIDE`). Hugging Face's transformers (ViT, DeiT, MAE, DINOv2, BEiT) have names of their own and
keep query, key and value apart (`HUGGING_FACE`: the names of its files and, since version 5, of its modules). DINOv2's own
files name a few tensors in another way (`DINOV2`). Numbers stay what they are, but for one sum: with registers, DINOv2 adds a
position to the class token that timm keeps inside it. Epsilons of layer norms are no tensors: timm's are 1e-6, as in the code
of the papers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection

import torch
from torch import Tensor

PREFIXES = (  # of two that fit equally well, the first is taken: a teacher before its student
    "module.",
    "model.",
    "_orig_mod.",
    "backbone.",
    "net.",
    "network.",
    "encoder.",
    "base_encoder.",  # MoCo v3
    "encoder_q.",  # MoCo v1 and v2
    "teacher.",
    "student.",
)
HEADS = ("head.", "head_drop.", "fc.", "classifier.", "head_dist.", "pre_logits.")
BESIDE = (  # what training states and models for other tasks hold beside the network
    "n_averaged",  # torch's AveragedModel
    "cls_classifier.",  # DeiT
    "distillation_classifier.",
    "pooler.",  # a layer behind the class token
    "mask_token",  # masked images: MAE, BEiT, iBOT, DINOv2
    "decoder.",
    "decoder_",
    "lm_head.",
    "momentum_encoder.",  # MoCo
    "encoder_k.",
    "queue",
    "predictor.",
    "projector.",
    "momentum_backbone.",  # solo-learn
    "momentum_projector.",
    "teacher.",  # DINO
    "student.",
    "dino_head.",
    "ibot_head.",
    "dino_loss.",
    "ibot_patch_loss.",
)
DERIVED = ("relative_position_index",)  # ends of names: BEiT's table of places, which follows from the size

_BLOCK = r"^(?:encoder\.layer|layers)\.(\d+)"
HUGGING_FACE = (  # pattern of a name -> timm's name
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.distillation_token", "dist_token"),
    (r"^embeddings\.register_tokens", "register_tokens"),
    (r"^embeddings\.mask_token", "mask_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (_BLOCK + r"\.(?:layernorm_before|norm1)", r"blocks.\1.norm1"),
    (_BLOCK + r"\.(?:layernorm_after|norm2)", r"blocks.\1.norm2"),
    (_BLOCK + r"\.attention\.(?:attention\.query|q_proj)", r"blocks.\1.attn.query"),
    (_BLOCK + r"\.attention\.(?:attention\.key|k_proj)", r"blocks.\1.attn.key"),
    (_BLOCK + r"\.attention\.(?:attention\.value|v_proj)", r"blocks.\1.attn.value"),
    (_BLOCK + r"\.attention\.(?:output\.dense|o_proj)", r"blocks.\1.attn.proj"),
    (_BLOCK + r"\.(?:attention\.attention\.)?relative_position_bias\.relative", r"blocks.\1.attn.relative"),
    (_BLOCK + r"\.mlp\.gate_proj", r"blocks.\1.mlp.gate"),
    (_BLOCK + r"\.mlp\.up_proj", r"blocks.\1.mlp.value"),
    (_BLOCK + r"\.(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)", r"blocks.\1.mlp.fc1"),
    (_BLOCK + r"\.(?:output\.dense|mlp\.fc2|mlp\.weights_out|mlp\.down_proj)", r"blocks.\1.mlp.fc2"),
    (_BLOCK + r"\.layer_scale(\d)\.lambda1", r"blocks.\1.ls\2.gamma"),
    (_BLOCK + r"\.lambda_(\d)", r"blocks.\1.gamma_\2"),
    (r"^pooler\.layernorm", "fc_norm"),
    (r"^layernorm", "norm"),
)
MARK = "embeddings.patch_embeddings.projection.weight"  # a file with a name that ends so is Hugging Face's

DINOV2 = (
    (r"blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # blocks in chunks, numbered through
    (r"mlp\.w12\.", "mlp.fc1."),
    (r"mlp\.w3\.", "mlp.fc2."),
)


def left_out(name: str) -> bool:
    """Whether a tensor that a network has no place for is known not to be a part of it."""
    return name.startswith(HEADS + BESIDE) or name.endswith(DERIVED)


def in_timm_names(given: dict[str, Tensor], wanted: Collection[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of a file under the names that a network wants, as far as they are known -> them, what was done.

    given   name -> tensor, in any layout named above
    wanted  names of the network's tensors
    """
    given, told = _from_hugging_face(given)
    given, cut = without_prefix(given, wanted)
    told += [f"names without {cut!r}"] if cut else []
    moved = {name: new for name in given if name not in wanted and (new := _renamed(name, DINOV2)) in wanted}
    if moved and len({moved.get(name, name) for name in given}) == len(given):
        given = {moved.get(name, name): value for name, value in given.items()}
        told.append("names of DINOv2's own files")
    return given, told + _registers(given, wanted)


def without_prefix(given: dict[str, Tensor], wanted: Collection[str]) -> tuple[dict[str, Tensor], str]:
    """The tensors without the known prefix under which most `wanted` ones lie, if more than without one -> them, the prefix.

    A prefix may be several, one behind the other (`module.backbone.`). Of tensors elsewhere, as many of these as they have
    are cut too. Nothing is cut where two tensors would have one name.
    """
    counts: dict[tuple[str, ...], int] = {(): 0}
    for name in given:
        chain: tuple[str, ...] = ()
        counts[chain] += name in wanted
        while (part := next((p for p in PREFIXES if name.startswith(p)), None)) is not None:
            name, chain = name.removeprefix(part), (*chain, part)
            counts[chain] = counts.get(chain, 0) + (name in wanted)
    ranked = sorted(counts, key=lambda chain: (len(chain), [PREFIXES.index(part) for part in chain]))
    best = max(ranked, key=lambda chain: counts[chain])
    if counts[best] == 0:  # nothing fits: what all names have in common says nothing, and is cut for the message
        best = max((chain for chain in ranked if all(n.startswith("".join(chain)) for n in given)), key=len)
    bare: dict[str, Tensor] = {}
    for name, value in given.items():
        for part in best:
            if not name.startswith(part):
                break
            name = name.removeprefix(part)
        bare[name] = value
    return (bare, "".join(best)) if len(bare) == len(given) else (given, "")


def _from_hugging_face(given: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Names of Hugging Face's vision transformers in timm's, q, k and v in one; other tensors stay -> them, what was done."""
    starts = [name.removesuffix(MARK) for name in given if name.endswith(MARK)]
    if len(starts) != 1:
        return given, []
    (start,) = starts
    found: dict[str, Tensor] = {}
    for name, value in given.items():
        inside = name.removeprefix(start) if name.startswith(start) else name
        found[_renamed(inside, HUGGING_FACE)] = value
    if len(found) < len(given):
        return given, []
    told = "names of Hugging Face's transformers" + (f" behind {start!r}" if start else "")
    return _joined(found), [told]


def _joined(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of each block that timm has in one: query, key and value as qkv, a gate and what it gates as fc1.

    Weights [D, D] -> [3 D, D], biases [D] -> [3 D]; where keys have no bias (BEiT) -> q_bias and v_bias [D].
    """
    out = dict(given)
    for name in given:
        for parts, whole in (("query", "key", "value"), "qkv"), (("gate", "value"), "fc1"):
            start, found, kind = name.rpartition(f".{parts[0]}.")
            names = [f"{start}.{part}.{kind}" for part in parts]
            if not found:
                continue
            if all(n in given for n in names):
                out[f"{start}.{whole}.{kind}"] = torch.cat([out.pop(n) for n in names])
            elif kind == "bias" and whole == "qkv" and names[1] not in given and names[2] in given:
                out |= {f"{start}.q_bias": out.pop(names[0]), f"{start}.v_bias": out.pop(names[2])}
    return out


def _registers(given: dict[str, Tensor], wanted: Collection[str]) -> list[str]:
    """Changes `given`: DINOv2's registers under timm's name, the class token with its position -> what was done."""
    if "register_tokens" not in given or "reg_token" not in wanted:
        return []
    given["reg_token"] = given.pop("register_tokens")
    places, token = given.get("pos_embed"), given.get("cls_token")
    if places is None or token is None or places.dim() != 3 or math.isqrt(places.shape[1] - 1) ** 2 != places.shape[1] - 1:
        return ["registers"]
    given["cls_token"], given["pos_embed"] = token + places[:, :1], places[:, 1:]
    return ["registers, the class token with its position"]


def _renamed(name: str, table: Collection[tuple[str, str]]) -> str:
    """The name after all rules of a table that fit it."""
    for pattern, new in table:
        name = re.sub(pattern, new, name)
    return name
