"""Kinds of parameter-efficient tuning that change the weight of a linear layer: W x becomes (W + D) x, D is 0 at the start.

    dora      D = m / |W + s B A|_row (W + s B A) - W       (DoRA, weight-decomposed: a size and a direction a row)
    vera      D = diag(b) B diag(d) A                       (VeRA: A and B random, frozen, shared by all layers)
    randlora  D = s sum_j B_j diag(l_j) A diag(g_j)         (RandLoRA: many random terms, of full rank together)
    allora    D = B A, gradients scaled by row              (ALLoRA: no scale to choose, no dropout)
    loldu     D = s P L diag(z) U - what it is at the start (LoLDU: the diagonal of a triangular decomposition of W)
    hydra     D = s_p U_p D_p + s_s U_s D_s W               (Hydra: a parallel and a sequential branch)
    miss      D = B, tiled along the inputs                 (MiSS: every chunk of the input gets the same matrix)
    bone      D_pq = W_pq B_p + B_p on square blocks        (Bone, block affine)
    mora      D x = spread(M squeeze(x))                    (MoRA: one square matrix of a high rank)

All are linear in x, so all can be merged (`weight_change.py`). Each hangs on the targets of `lora` (q, k, v, qkv, proj, fc1,
fc2); q, k and v are rows of one layer, which is exact for every kind here.

Compare kinds at equal numbers of trained values, not at equal rank: rank means something else in each.

Shapes: x [B, ..., I], W [O, I]; a value has its own shape, or a first axis B where a batch mixes states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.interfaces import UserError
from clbench.models.pet import Network, Pet, kaiming, normal, zeros
from clbench.models.pet_modules import Spec
from clbench.models.pet_sites import Blocks, affine, broadcast
from clbench.models.weight_change import Pass, attach, copied, filled, target_sites
from clbench.streams import rng


def dora(
    model: Network,
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
    sites, spec = target_sites(model, "dora", targets, blocks, rank), Spec()
    for site in sites:
        (out, into), name = site.shape, site.name
        size = site.weight.detach().square().sum(-1).sqrt()
        spec |= {f"{name}/a": ((rank, into), kaiming), f"{name}/b": ((out, rank), zeros), f"{name}/m": ((out,), copied(size))}
    return attach(model, runtime, "dora", sites, spec, partial(_dora, scale=scale))


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
    model: Network,
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
    sites, spec = target_sites(model, "vera", targets, blocks, rank), Spec()
    for site in sites:
        spec |= {f"{site.name}/d": ((rank,), filled(start)), f"{site.name}/b": ((site.shape[0],), zeros)}
    outs, ins = (max(site.shape[axis] for site in sites) for axis in (0, 1))
    draw = torch.Generator().manual_seed(rng.key(runtime.seed, "pet", "vera") >> 1)
    a, b = (torch.empty(shape) for shape in ((rank, ins), (outs, rank)))
    for matrix in (a, b):
        nn.init.kaiming_uniform_(matrix, generator=draw)
    return attach(model, runtime, "vera", sites, spec, _vera, {"frozen_a": a, "frozen_b": b})


def _vera(p: Pass) -> Tensor:
    d, b = (broadcast(p.get(part), p.x) for part in "db")
    out, into = p.weight.shape
    return b * F.linear(d * F.linear(p.x, p.fixed("a")[:, :into]), p.fixed("b")[:out])


def randlora(
    model: Network,
    runtime: Any,
    *,
    rank: int = 32,  # of one random term; a smaller one makes more terms, and more values
    targets: Sequence[str] = ("k", "v"),
    scale: float = 20.0,  # of all terms; the default is a choice
    blocks: Blocks = None,
) -> Pet:
    """RandLoRA (Albert et al. 2025, arXiv 2502.00987): W' = W + s sum_j B_j diag(l_j) A diag(g_j), N = ceil(min(O, I) / r).

    A [r, min] and B_j [max, r] are Kaiming-uniform, divided by their standard deviation, drawn from the seed for the largest
    target and cut for smaller ones; the sum is transposed where O < I. Only l [N, r], 0 at the start, and g [N, min],
    1 / max(N, min), train: N (r + min) values. Left out: the sparse ternary bases. D is built as a matrix, one a sample where
    a batch mixes states.
    """
    sites, spec = target_sites(model, "randlora", targets, blocks, rank), Spec()
    short, long, terms = 0, 0, 0
    for site in sites:
        low, high = sorted(site.shape)
        number = -(-low // rank)
        spec |= {f"{site.name}/l": ((number, rank), zeros), f"{site.name}/g": ((number, low), filled(1 / max(number, low)))}
        short, long, terms = max(short, low), max(long, high), max(terms, number)
    draw = torch.Generator().manual_seed(rng.key(runtime.seed, "pet", "randlora") >> 1)
    a, b = torch.empty(rank, short), torch.empty(long, terms, rank)
    for matrix in (a, b):
        nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=draw)
        matrix /= matrix.std()
    return attach(model, runtime, "randlora", sites, spec, partial(_randlora, scale=scale), {"frozen_a": a, "frozen_b": b})


def _randlora(p: Pass, scale: float) -> Tensor:
    (l, mixed), (g, _) = p.get("l"), p.get("g")  # noqa: E741
    out, into = p.weight.shape
    terms, low = l.shape[-2], g.shape[-1]
    right = l.unsqueeze(-1) * p.fixed("a")[:, :low] * g.unsqueeze(-2)  # [..., N, r, min]
    delta = scale * p.fixed("b")[: max(out, into), :terms].flatten(1) @ right.flatten(-3, -2)
    return affine(p.x, (delta if out >= into else delta.transpose(-1, -2), mixed))


def allora(
    model: Network,
    runtime: Any,
    *,
    rank: int = 5,
    targets: Sequence[str] = ("k", "v"),
    eta: float = 1.0,  # the largest factor, that of a row which is 0
    blocks: Blocks = None,
) -> Pet:
    """ALLoRA, adaptive learning rate (Huang & Balestriero 2024, arXiv 2410.09692): W' = W + B A, without scale and dropout.

    A, B as in `lora`: r (I + O) values. What reaches A and B of the gradient of row k of B A is multiplied by
    1 / sqrt(|(B A)_k| + 1 / eta^2), a constant of the backward pass: rows leave 0 quickly and slow down as they grow. The
    gradient of x is not. The default of eta is a choice.
    """
    if not eta > 0:
        raise UserError(f"pet=allora: eta must be above 0, got {eta}")
    sites, spec = target_sites(model, "allora", targets, blocks, rank), Spec()
    for site in sites:
        spec |= {f"{site.name}/a": ((rank, site.shape[1]), kaiming), f"{site.name}/b": ((site.shape[0], rank), zeros)}
    return attach(model, runtime, "allora", sites, spec, partial(_allora, eta=eta))


def _allora(p: Pass, eta: float) -> Tensor:
    (a, mixed), (b, _) = p.get("a"), p.get("b")
    term = affine(affine(p.x, (a.detach(), mixed)), (b.detach(), mixed))
    if not torch.is_grad_enabled():
        return term
    trained = affine(affine(p.x.detach(), (a, mixed)), (b, mixed))
    factor = broadcast(((_row_norms(torch.zeros_like(p.weight), a, b, 1.0) + eta**-2).rsqrt(), mixed), p.x)
    return term + factor * (trained - trained.detach())


def loldu(
    model: Network,
    runtime: Any,
    *,
    rank: int = 64,  # at most the shorter side of W
    targets: Sequence[str] = ("k", "v"),
    scale: float = 1.0,
    blocks: Blocks = None,
) -> Pet:
    """LoLDU, lower-diag-upper decomposition (Shi et al. 2024, arXiv 2410.13618): W' = W + s P L_r diag(z) U_r - W_r.

    W = P L D U:
    P is a permutation, L and U are triangular with ones on the diagonal; L_r and U_r are the first r columns and rows. Only
    z [r], the first r of D at the start, and s train: r + 1 values. W_r is the term at the start. Deviations: W is kept as it
    is and W_r counted in D, so that the start is exact and W comes back; P L_r is stored, and not P. The other starts of z
    that are published change the network and are left out.
    """
    sites, spec = target_sites(model, "loldu", targets, blocks, rank), Spec()
    frozen = {}
    for site in sites:
        if rank > min(site.shape):
            raise UserError(f"pet=loldu: rank={rank} is above a side of {site.name} of {site.shape[0]} x {site.shape[1]}")
        left, lower, upper = torch.linalg.lu(site.weight.detach().cpu().double())
        pivots = upper.diagonal()[:rank]
        if not bool((pivots != 0).all()):
            raise UserError(f"pet=loldu: the weight of {site.name} has a rank below {rank}")
        frozen |= {f"{site.name}/left": (left @ lower)[:, :rank].float(), f"{site.name}/start": scale * pivots.float()}
        frozen[f"{site.name}/upper"] = (upper[:rank] / pivots[:, None]).float()
        spec |= {f"{site.name}/z": ((rank,), copied(pivots)), f"{site.name}/s": ((), filled(scale))}
    return attach(model, runtime, "loldu", sites, spec, _loldu, frozen)


def _loldu(p: Pass) -> Tensor:
    (z, mixed), (s, _) = p.get("z"), p.get("s")
    moved = broadcast(((s.unsqueeze(-1) if mixed else s) * z - p.fixed("start"), mixed), p.x)
    return F.linear(moved * F.linear(p.x, p.fixed("upper")), p.fixed("left"))


def hydra(
    model: Network,
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
    sites, spec = target_sites(model, "hydra", targets, blocks, rank), Spec()
    for site in sites:
        out, into = site.shape
        for branch, width in (("parallel", into), ("sequential", out)):
            spec[f"{site.name}/{branch}_down"] = ((rank, width), normal(0.0, std))
            spec[f"{site.name}/{branch}_up"] = ((out, rank), zeros)
    return attach(model, runtime, "hydra", sites, spec, partial(_hydra, scales=(scale, sequential_scale)))


def _hydra(p: Pass, scales: tuple[float, float]) -> Tensor:
    parallel = affine(affine(p.x, p.get("parallel_down")), p.get("parallel_up"))
    sequential = affine(affine(p.wx(), p.get("sequential_down")), p.get("sequential_up"))
    return scales[0] * parallel + scales[1] * sequential


def miss(
    model: Network,
    runtime: Any,
    *,
    rank: int = 10,  # width of a chunk of the input
    targets: Sequence[str] = ("k", "v"),
    blocks: Blocks = None,
) -> Pet:
    """MiSS, the successor of Bone: the chunks of x, of width r, are added up (the last padded with 0) and mapped by B [O, r].

    B is 0 at the start; r O values. W' = W + B tiled along the inputs.
    """
    sites = target_sites(model, "miss", targets, blocks, rank)
    spec: Spec = {f"{site.name}/b": ((site.shape[0], rank), zeros) for site in sites}
    return attach(model, runtime, "miss", sites, spec, partial(_miss, rank=rank))


def _miss(p: Pass, rank: int) -> Tensor:
    x = F.pad(p.x, (0, -p.x.shape[-1] % rank))
    return affine(x.reshape(*x.shape[:-1], -1, rank).sum(-2), p.get("b"))


def bone(
    model: Network,
    runtime: Any,
    *,
    rank: int = 16,  # side of a block; divides the sides of W
    targets: Sequence[str] = ("k", "v"),
    blocks: Blocks = None,
) -> Pet:
    """Bone, block affine adaptation: W in r x r blocks W_pq, W'_pq = W_pq + W_pq B_p + B_p, one B_p a row of blocks, 0 first.

    r O values. D is built as a whole matrix, one a sample where a batch mixes states.
    """
    sites, spec = target_sites(model, "bone", targets, blocks, rank), Spec()
    for site in sites:
        out, into = site.shape
        if out % rank or into % rank:
            raise UserError(f"pet=bone: rank={rank} does not divide {site.name} of {out} x {into}: choose a common divisor")
        spec[f"{site.name}/b"] = ((out // rank, rank, rank), zeros)
    return attach(model, runtime, "bone", sites, spec, _bone)


def _bone(p: Pass) -> Tensor:
    b, mixed = p.get("b")
    (out, into), side = p.weight.shape, b.shape[-1]
    blocks = p.weight.reshape(out // side, side, into // side, side)
    delta = torch.einsum("paqc,...pcd->...paqd", blocks, b) + b.unsqueeze(-2)
    return affine(p.x, (delta.reshape(*b.shape[:-3], out, into), mixed))


def mora(
    model: Network,
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
    sites, spec = target_sites(model, "mora", targets, blocks, rank), Spec()
    for site in sites:
        side = round(math.sqrt(sum(site.shape) * rank))
        side += side % 2 if form == "rotate" else 0
        spec[f"{site.name}/m"] = ((side, side), zeros)
    return attach(model, runtime, "mora", sites, spec, partial(_mora, rotate=form == "rotate"))


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
