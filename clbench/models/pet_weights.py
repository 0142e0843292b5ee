"""Kinds of parameter-efficient tuning that change the weight of a linear layer: W x becomes (W + D) x, D is 0 at the start.

    dora      D = m / |W + s B A|_row (W + s B A) - W       (DoRA, weight-decomposed: a size and a direction a row)
    vera      D = diag(b) B diag(d) A                       (VeRA: A and B random, frozen, shared by all layers)
    hydra     D = s_p U_p D_p + s_s U_s D_s W               (Hydra: a parallel and a sequential branch)
    miss      D = B, tiled along the inputs                 (MiSS: every chunk of the input gets the same matrix)
    bone      D_pq = W_pq B_p + B_p on square blocks        (Bone, block affine)
    mora      D x = spread(M squeeze(x))                    (MoRA: one square matrix of a high rank)

All are linear in x, so all can be merged. Each hangs on the targets of `lora` (q, k, v, qkv, proj, fc1, fc2); q, k and v are
rows of one layer, which is exact for every kind here. `unmerge` puts the weight back that `merge` found, to the last bit.

Compare kinds at equal numbers of trained values, not at equal rank: rank means something else in each.

Shapes: x [B, ..., I], W [O, I]; a value has its own shape, or a first axis B where a batch mixes states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.interfaces import UserError
from clbench.models.backbone import Backbone
from clbench.models.pet import Init, Pet, kaiming, normal, zeros
from clbench.models.pet_modules import LORA_TARGETS, Spec
from clbench.models.pet_sites import Blocks, affine, broadcast, chosen, linear_of
from clbench.streams import rng

Value = tuple[Tensor, bool]  # and whether its first axis is the batch


class Pass(NamedTuple):
    """What a kind sees of a layer in a pass: input, W x (no bias) on demand, W, values and frozen tensors by name."""

    x: Tensor
    wx: Callable[[], Tensor]
    weight: Tensor
    get: Callable[[str], Value]
    fixed: Callable[[str], Tensor]


Form = Callable[[Pass], Tensor]


class Site(NamedTuple):
    """A target layer: the name of its values, and its rows (all, or a third)."""

    name: str
    layer: nn.Linear
    rows: slice

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        out, into = self.layer.weight[self.rows].shape
        return out, into


@dataclass(eq=False)
class WeightChange:
    """Adds D x to the output of a linear layer's rows; called with a sign, it folds D into the weight or takes it out."""

    pet: Pet
    site: Site
    form: Form
    before: Tensor | None = None
    per_token: ClassVar[bool] = True

    def add(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Hook behind the layer."""
        if not self.pet.active:
            return out
        name, layer, rows = self.site
        bias = 0 if layer.bias is None else layer.bias[rows]

        def get(part: str) -> Value:
            return self.pet.get(f"{name}/{part}", len(args[0]))

        delta = self.form(Pass(args[0], lambda: out[..., rows] - bias, layer.weight[rows], get, self._fixed))
        if delta.shape == out.shape:
            return out + delta
        changed = out.clone()
        changed[..., rows] += delta
        return changed

    def __call__(self, sign: float) -> None:
        """D is what the kind makes of the unit vectors, in float64."""
        weight = self.site.layer.weight[self.site.rows]
        if sign < 0:
            assert self.before is not None
            weight.copy_(self.before)
            self.before = None
            return
        w = weight.double()

        def get(part: str) -> Value:
            return self.pet.values[f"{self.site.name}/{part}"].double(), False

        eye = torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
        delta = self.form(Pass(eye, lambda: w.T, w, get, lambda part: self._fixed(part).double())).T
        self.before = weight.clone()
        weight.copy_(w + delta)

    def _fixed(self, part: str) -> Tensor:
        own = getattr(self.pet, f"{self.site.name}/{part}", None)
        return getattr(self.pet, f"frozen_{part}") if own is None else own


def dora(
    model: Backbone,
    runtime: Any,
    *,
    rank: int = 5,
    targets: Sequence[str] = ("k", "v"),  # of q, k, v, qkv, proj, fc1, fc2
    scale: float = 1.0,
    blocks: Blocks = None,
) -> Pet:
    """DoRA, weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv 2402.09353): W' = m / |W + s B A|_row (W + s B A).

    m [O] starts as the rows' norms of W, A and B as in `lora`: r (I + O) + O values. The norm counts as a constant in the
    backward pass, with the low-rank part inside it; the bias stays outside.
    """
    sites, spec = _sites(model, "dora", targets, blocks, rank), Spec()
    for name, layer, rows in sites:
        out, into = layer.weight[rows].shape
        size = layer.weight.detach()[rows].square().sum(-1).sqrt()
        spec |= {f"{name}/a": ((rank, into), kaiming), f"{name}/b": ((out, rank), zeros), f"{name}/m": ((out,), _copied(size))}
    return _attach(model, runtime, "dora", sites, spec, partial(_dora, scale=scale))


def _dora(p: Pass, scale: float) -> Tensor:
    (a, mixed), (b, _), (m, _) = p.get("a"), p.get("b"), p.get("m")
    ratio = broadcast((m / _row_norms(p.weight, a, b, scale).clamp_min(1e-12), mixed), p.x)
    return (ratio - 1) * p.wx() + ratio * scale * affine(affine(p.x, (a, mixed)), (b, mixed))


@torch.no_grad()
def _row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Norms of the rows of W + s B A, without that matrix: |w|^2 + 2 s b A w + s^2 b A A' b' -> [O] or [B, O]."""
    with torch.autocast(weight.device.type, enabled=False):
        cross = (b * (a @ weight.T).transpose(-1, -2)).sum(-1)
        own = (b @ (a @ a.transpose(-1, -2)) * b).sum(-1)
        return (weight.square().sum(-1) + 2 * scale * cross + scale**2 * own).clamp_min(0).sqrt()


def vera(
    model: Backbone,
    runtime: Any,
    *,
    rank: int = 256,
    targets: Sequence[str] = ("k", "v"),
    start: float = 0.1,  # of d; b starts at 0
    blocks: Blocks = None,
) -> Pet:
    """VeRA, vector-based random matrix adaptation (Kopiczko et al. 2024, arXiv 2310.11454): W' = W + diag(b) B diag(d) A.

    A [r, I] and B [O, r] are U(+-sqrt(6 / fan_in)), drawn from the seed for the largest target and cut for smaller ones; only
    d [r] and b [O] train. Takes learning rates well above those of `lora`.
    """
    sites, spec = _sites(model, "vera", targets, blocks, rank), Spec()
    for site in sites:
        spec |= {f"{site.name}/d": ((rank,), _filled(start)), f"{site.name}/b": ((site.shape[0],), zeros)}
    outs, ins = (max(site.shape[axis] for site in sites) for axis in (0, 1))
    draw = torch.Generator().manual_seed(rng.key(runtime.seed, "pet", "vera") >> 1)
    a, b = (torch.empty(shape) for shape in ((rank, ins), (outs, rank)))
    for matrix in (a, b):
        nn.init.kaiming_uniform_(matrix, generator=draw)
    return _attach(model, runtime, "vera", sites, spec, _vera, {"frozen_a": a, "frozen_b": b})


def _vera(p: Pass) -> Tensor:
    d, b = (broadcast(p.get(part), p.x) for part in "db")
    out, into = p.weight.shape
    return b * F.linear(d * F.linear(p.x, p.fixed("a")[:, :into]), p.fixed("b")[:out])


def hydra(
    model: Backbone,
    runtime: Any,
    *,
    rank: int = 2,
    targets: Sequence[str] = ("fc2",),
    scale: float = 1.0,
    sequential_scale: float = 1.0,
    std: float = 0.02,
    blocks: Blocks = None,
) -> Pet:
    """Hydra, multi-head low-rank adaptation (Kim et al. 2023): W' = (1 + s_s U_s D_s) W + s_p U_p D_p.

    D_p [r, I] and D_s [r, O] are N(0, std^2), U_p and U_s [O, r] 0. Deviation: no biases in the branches, and the sequential
    one sees W x without the layer's bias.
    """
    sites, spec = _sites(model, "hydra", targets, blocks, rank), Spec()
    for site in sites:
        out, into = site.shape
        for branch, width in (("parallel", into), ("sequential", out)):
            spec[f"{site.name}/{branch}_down"] = ((rank, width), normal(0.0, std))
            spec[f"{site.name}/{branch}_up"] = ((out, rank), zeros)
    return _attach(model, runtime, "hydra", sites, spec, partial(_hydra, scales=(scale, sequential_scale)))


def _hydra(p: Pass, scales: tuple[float, float]) -> Tensor:
    parallel = affine(affine(p.x, p.get("parallel_down")), p.get("parallel_up"))
    sequential = affine(affine(p.wx(), p.get("sequential_down")), p.get("sequential_up"))
    return scales[0] * parallel + scales[1] * sequential


def miss(
    model: Backbone,
    runtime: Any,
    *,
    rank: int = 10,  # width of a chunk of the input
    targets: Sequence[str] = ("k", "v"),
    blocks: Blocks = None,
) -> Pet:
    """MiSS, the successor of Bone: the chunks of x, of width r, are added up (the last padded with 0) and mapped by B [O, r].

    B is 0 at the start; r O values. W' = W + B tiled along the inputs.
    """
    sites = _sites(model, "miss", targets, blocks, rank)
    spec: Spec = {f"{site.name}/b": ((site.shape[0], rank), zeros) for site in sites}
    return _attach(model, runtime, "miss", sites, spec, partial(_miss, rank=rank))


def _miss(p: Pass, rank: int) -> Tensor:
    x = F.pad(p.x, (0, -p.x.shape[-1] % rank))
    return affine(x.reshape(*x.shape[:-1], -1, rank).sum(-2), p.get("b"))


def bone(
    model: Backbone,
    runtime: Any,
    *,
    rank: int = 16,  # side of a block; divides the sides of W
    targets: Sequence[str] = ("k", "v"),
    blocks: Blocks = None,
) -> Pet:
    """Bone, block affine adaptation: W in r x r blocks W_pq, W'_pq = W_pq + W_pq B_p + B_p, one B_p a row of blocks, 0 first.

    r O values. D is built as a whole matrix, one a sample where a batch mixes states.
    """
    sites, spec = _sites(model, "bone", targets, blocks, rank), Spec()
    for site in sites:
        out, into = site.shape
        if out % rank or into % rank:
            raise UserError(f"pet=bone: rank={rank} does not divide {site.name} of {out} x {into}: choose a common divisor")
        spec[f"{site.name}/b"] = ((out // rank, rank, rank), zeros)
    return _attach(model, runtime, "bone", sites, spec, _bone)


def _bone(p: Pass) -> Tensor:
    b, mixed = p.get("b")
    (out, into), side = p.weight.shape, b.shape[-1]
    blocks = p.weight.reshape(out // side, side, into // side, side)
    delta = torch.einsum("paqc,...pcd->...paqd", blocks, b) + b.unsqueeze(-2)
    return affine(p.x, (delta.reshape(*b.shape[:-3], out, into), mixed))


def mora(
    model: Backbone,
    runtime: Any,
    *,
    rank: int = 5,  # of low-rank terms with as many values: the square has the side sqrt((I + O) rank)
    targets: Sequence[str] = ("k", "v"),
    form: Literal["rotate", "sum"] = "rotate",
    blocks: Blocks = None,
) -> Pet:
    """MoRA, high-rank updating (Jiang et al. 2024): D x = spread(M squeeze(x)), M [R, R] square, 0 at the start.

    x is cut into chunks of R; the last is filled up from the head of x.
    sum      squeeze adds the chunks, spread repeats the result along the outputs ("type 1")
    rotate   chunk c is turned by the angles of rotary embeddings at position c (base 10000), M acts on each, and the results
             follow one another, repeated or cut to O ("type 6"); R is even. The default is a choice.
    """
    if form not in ("rotate", "sum"):
        raise UserError(f"unknown form={form!r} of pet=mora: choose rotate or sum")
    sites, spec = _sites(model, "mora", targets, blocks, rank), Spec()
    for site in sites:
        side = round(math.sqrt(sum(site.shape) * rank))
        side += side % 2 if form == "rotate" else 0
        spec[f"{site.name}/m"] = ((side, side), zeros)
    return _attach(model, runtime, "mora", sites, spec, partial(_mora, rotate=form == "rotate"))


def _mora(p: Pass, rotate: bool) -> Tensor:
    m, mixed = p.get("m")
    (out, into), side, x = p.weight.shape, m.shape[-1], p.x
    chunks = -(-into // side)
    x = x[..., torch.arange(chunks * side, device=x.device) % into].reshape(*x.shape[:-1], chunks, side)
    if rotate:
        position, pair = (torch.arange(n, dtype=m.dtype, device=x.device) for n in (chunks, side // 2))
        angle = position[:, None] * 1e4 ** (-2 * pair / side)
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        low, high = x.chunk(2, dim=-1)
        y = affine(x * cos + torch.cat([-high, low], dim=-1) * sin, (m, mixed)).flatten(-2)
    else:
        y = affine(x.sum(-2), (m, mixed))
    return y[..., torch.arange(out, device=y.device) % y.shape[-1]]


def _sites(model: Backbone, kind: str, targets: Sequence[str], blocks: Blocks, rank: int) -> list[Site]:
    """The target layers of the chosen blocks. No row may be a target twice: a merge could not tell the changes apart."""
    unknown = [t for t in targets if t not in LORA_TARGETS]
    if unknown or not targets:
        raise UserError(f"unknown targets {list(unknown)} of pet={kind}: choose from {', '.join(LORA_TARGETS)}")
    if len(set(targets)) != len(targets) or ("qkv" in targets and {"q", "k", "v"} & set(targets)):
        raise UserError(f"pet={kind}: targets={list(targets)} name a layer twice: choose qkv or its thirds, each once")
    if rank < 1:
        raise UserError(f"pet={kind}: rank must be at least 1, got {rank}")

    def every() -> Iterator[Site]:
        for i, block in chosen(model.net, blocks, kind, ("mlp",)):
            for target in targets:
                layer, part = linear_of(block, target, kind)
                third = layer.out_features // 3
                yield Site(f"{i}/{target}", layer, slice(None) if part is None else slice(part * third, (part + 1) * third))

    return list(every())


def _attach(
    model: Backbone,
    runtime: Any,
    kind: str,
    sites: Sequence[Site],
    spec: Spec,
    form: Form,
    frozen: Mapping[str, Tensor] | None = None,
) -> Pet:
    """The pet with its hooks. `frozen` tensors go with it, but into no state: they follow from the seed or from W."""
    pet = Pet(model, runtime, kind, spec)
    for name, value in (frozen or {}).items():
        pet.register_buffer(name, value.to(runtime.device), persistent=False)
    for site in sites:
        change = WeightChange(pet, site, form)
        site.layer.register_forward_hook(change.add)
        pet.merges.append(change)
    return pet


def _copied(value: Tensor) -> Init:
    """A start that is known."""
    return lambda x, generator: x.copy_(value)


def _filled(value: float) -> Init:
    return lambda x, generator: x.fill_(value)
