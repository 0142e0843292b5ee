"""CorDA, context-oriented decomposition adaptation (Yang et al., NeurIPS 2024, arXiv 2406.05223): low-rank terms from data.

C = X' X is what the inputs of a layer look like on calibration images. With SVD(W C) = U S V' and A_j = S_j^1/2 (V' C^-1)_j,
B_j = U_j S_j^1/2, the sum of all B_j A_j is W. The terms of r components are trained, the rest of W is frozen:

    W' = W + B A - B_0 A_0          B_0, A_0 are B, A at the start

components  smallest: those that calibration data use least, so that what the network does on them is kept (the paper's
            "knowledge-preserved"); largest: those that they use most ("instruction-previewed")

Calibration is on the first experience's own images, before its first step, under the test transform and with the bare network.
Choices: `samples` random images of it; C is the mean over tokens in float64, which settles how a component's size is shared
by A and B. C gets lambda I, lambda = damping times its mean diagonal, doubled until its inverse is one to 0.05.
Deviations: W is kept as it is, so that the start is exact and W comes back to the last bit; float64 for float32.

State: B, A as values, B_0, A_0 and whether they are there as buffers: an experience later nothing is calibrated again.

Shapes: x [B, ..., I], W [O, I], C [I, I].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.interfaces import Data, Place, UserError
from clbench.models.backbone import Backbone
from clbench.models.pet import Pet, zeros
from clbench.models.pet_modules import Spec
from clbench.models.pet_sites import Blocks, affine
from clbench.models.weight_change import Pass, Site, attach, guided_only, target_sites
from clbench.streams import rng

EXACT = 0.05  # |C C^-1 - I|
BATCH = 64  # images of a calibration pass


def corda(
    model: Backbone,
    runtime: Any,
    *,
    rank: int = 5,
    targets: Sequence[str] = ("k", "v"),  # of q, k, v, qkv, proj, fc1, fc2
    components: Literal["smallest", "largest"] = "smallest",
    samples: int = 256,  # images of the first experience that calibrate
    damping: float = 0.01,
    blocks: Blocks = None,
) -> Pet:
    """Low-rank terms that begin as components of W, chosen with the first experience's images: r (I + O) values."""
    if components not in ("smallest", "largest"):
        raise UserError(f"unknown components={components!r} of pet=corda: choose smallest or largest")
    if samples < 1 or not damping > 0:
        raise UserError(f"pet=corda: samples must be at least 1 and damping above 0, got {samples} and {damping}")
    sites, spec = target_sites(model, "corda", targets, blocks, rank), Spec()
    for site in sites:
        out, into = site.shape
        if rank > min(out, into):
            raise UserError(f"pet=corda: rank={rank} is above a side of {site.name} of {out} x {into}")
        spec |= {f"{site.name}/a": ((rank, into), zeros), f"{site.name}/b": ((out, rank), zeros)}
    guide = Calibration(model, sites, runtime, components == "smallest", samples, damping)
    pet = attach(model, runtime, "corda", sites, spec, guide.form)
    for name, value in list(pet.values.items()):
        pet.register_buffer(f"{name}_start", torch.zeros_like(value.detach()))
    pet.register_buffer("calibrated", torch.zeros((), dtype=torch.bool, device=runtime.device))
    pet.guide = guide
    guide.pet = pet
    return pet


def decomposed(weight: Tensor, cov: Tensor, rank: int, smallest: bool, damping: float) -> tuple[Tensor, Tensor]:
    """W [O, I] and C [I, I], both float64 -> B [O, r], A [r, I] of the smallest or the largest components of W C."""
    extra, eye = damping * cov.diagonal().mean(), torch.eye(len(cov), dtype=cov.dtype)
    assert 0 < extra < math.inf, "inputs that are all 0, or not finite"
    while not float(((cov + extra * eye) @ torch.linalg.inv_ex(cov + extra * eye).inverse - eye).norm()) < EXACT:
        extra = 2 * extra
    cov = cov + extra * eye
    u, s, v = torch.linalg.svd(weight @ cov, full_matrices=False)
    part = slice(-rank, None) if smallest else slice(rank)
    u, root, v = u[:, part], s[part].sqrt(), v[part]
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()  # that of a component is free
    a = torch.linalg.solve(cov, (v * sign.T).T).T
    return u * sign * root, root[:, None] * a


@dataclass(eq=False)
class Calibration:
    """What CorDA does before its first training."""

    model: Backbone
    sites: list[Site]
    runtime: Any
    smallest: bool
    samples: int
    damping: float
    pet: Any = None  # set when it is made
    begun: bool = False

    def form(self, p: Pass) -> Tensor:
        """B A x - B_0 A_0 x: nothing at the start, to the last bit."""
        guided_only(self.pet, self.begun)
        start = F.linear(F.linear(p.x, p.fixed("a_start")), p.fixed("b_start"))
        return affine(affine(p.x, p.get("a")), p.get("b")) - start

    def begin(self, data: Data) -> None:
        """Calibrate, if that was not done."""
        self.begun, pet = True, self.pet
        if bool(pet.calibrated):
            return
        covs, state = self.covariances(data), {}
        for site in self.sites:
            name, layer = site.name, site.layer
            weight, rank = site.weight.detach().cpu().double(), len(pet.values[f"{name}/a"])
            b, a = decomposed(weight, covs[layer], rank, self.smallest, self.damping)
            state |= {f"{name}/a": a.float(), f"{name}/b": b.float()}
        pet.insert(state)
        for name, value in state.items():
            getattr(pet, f"{name}_start").copy_(value)
        pet.calibrated.fill_(True)

    @torch.no_grad()
    def covariances(self, data: Data) -> dict[nn.Module, Tensor]:
        """The mean of x x' over the tokens that each layer of the bare network sees, on random images of `data`."""
        sums, counts = dict[nn.Module, Tensor](), dict[nn.Module, int]()

        def watch(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            with torch.autocast(args[0].device.type, enabled=False):
                x = args[0].float().flatten(0, -2)
                sums[layer] = sums.get(layer, 0) + (x.T @ x).cpu().double()
                counts[layer] = counts.get(layer, 0) + len(x)

        rows = rng.permutation(self.runtime.key("corda"), len(data))[: self.samples]
        model, was = self.model, self.model.training
        model.eval()
        with self.runtime.phase("calibrate"), self.pet.off(), ExitStack() as stack:
            for layer in {site.layer: None for site in self.sites}:
                stack.callback(layer.register_forward_pre_hook(watch).remove)
            for first in range(0, len(rows), BATCH):
                self.runtime.check_stop()
                model.tokens(data.batch(rows[first : first + BATCH]))
        model.train(was)
        return {layer: total / counts[layer] for layer, total in sums.items()}

    def penalty(self) -> None:
        """Nothing joins the loss."""

    def after_step(self, place: Place) -> None:
        """Nothing follows a step."""
