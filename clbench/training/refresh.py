"""Refresh learning ("A Unified and General Framework for Continual Learning", ICLR 2024): forget a little, then learn.

Before each step of a learner, `steps` times: theta moves so that the cross-entropy L of the batch's new samples rises, less
where the diagonal Fisher information F says that a weight matters.

variant  "official" (default), tensor by tensor, with u = 0.01 grad L and xi ~ N(0, 1):
           theta <- theta + size (|theta| u / |u| + noise xi) / (1 + 0.001 F),   size 1e-5, noise 1e-3
         so a step is `size` of a tensor's norm whatever the gradient is, and nearly free of noise.
         "paper": theta <- theta + size F^-1 grad L + noise N(0, 2 size F^-1)
fisher   "per_sample": after each experience F <- 1e-5 F + the mean over its samples of the squared gradient of each one's
         cross-entropy, under the test transform. official: in training mode, one image a batch, each square times the
         probability of the true label. paper: in evaluation mode, without that weight. "none": F = 0; for streams that
         cannot be read again.

Choices: the paper has no F before the first experience ends, so F^-1 is 1 / (1 + F) here; its size (1e-8) and the factor of its
noise (1) are start values. Deviations: the pass leaves statistics of normalisation as they were; no weight decay in it
(the release has one on two of its three data sets). Noise has a generator of its own: with size 0 nothing changes.
Published (as quoted, not checked): CIFAR-100 in 10 experiences, memory 500, DER++ 36.37 -> 38.49 % last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clbench.interfaces import UserError
from clbench.training.fisher import Weights, moved, trained
from clbench.training.online import gradients
from clbench.training.runtime import Runtime

Modules = Mapping[str, nn.Module]
DECAY, WEIGHT, RATE = 1e-5, 1e-3, 0.01  # tau, lambda and the rate of the ascent in the release


class Refresh:
    """State: Fisher information by part and weight, empty before the first experience has ended."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        variant: Literal["official", "paper"] = "official",
        size: float | None = None,  # null: official 1e-5 (of a tensor's norm), paper 1e-8
        noise: float | None = None,  # null: official 1e-3, paper 1
        steps: int = 1,  # before each of the learner's
        fisher: Literal["per_sample", "none"] = "per_sample",
    ):
        for name, value, known in (("variant", variant, ("official", "paper")), ("fisher", fisher, ("per_sample", "none"))):
            if value not in known:
                raise UserError(f"unknown learner.refresh {name}={value}: choose {' or '.join(known)}")
        self.runtime, self.official, self.steps, self.measures = runtime, variant == "official", steps, fisher != "none"
        self.size = (1e-5 if self.official else 1e-8) if size is None else size
        self.noise = (1e-3 if self.official else 1.0) if noise is None else noise
        if self.size < 0 or self.noise < 0 or steps < 1:
            raise UserError(f"learner.refresh needs size and noise from 0, steps from 1: got {size}, {noise}, {steps}")
        self.fisher: Weights = {}

    def unlearn(self, modules: Modules, loss: Callable[[], Tensor], step: int) -> None:
        """Move the trained weights of `modules` before step `step` of a `fit`."""
        generator, weights = self.runtime.generator("refresh", step), by_name(modules)
        for _ in range(self.steps):
            with traceless(modules):
                grads = gradients(loss(), list(weights.values()))
            for (name, p), g in zip(weights.items(), grads, strict=True):
                xi = torch.randn(p.shape, generator=generator).to(p)
                with torch.no_grad():
                    p += self.change(p, g, xi, self.fisher.get(name, torch.zeros_like(p)))

    def change(self, p: Tensor, g: Tensor, xi: Tensor, f: Tensor) -> Tensor:
        """What a tensor is changed by: weights, gradient, noise and Fisher information of one shape."""
        if self.official:
            u = RATE * g
            return self.size * (p.norm() / (u.norm() + 1e-20) * u + self.noise * xi) / (1 + WEIGHT * f)
        return self.size / (1 + f) * g + self.noise * (2 * self.size / (1 + f)).sqrt() * xi

    def measure(self, modules: Modules, data: Any, loss: Callable[[Any], Tensor]) -> None:
        """Update the Fisher information by the samples of an experience, one by one."""
        if not self.measures:
            return
        weights = by_name(modules)
        total = {name: torch.zeros_like(p, requires_grad=False) for name, p in weights.items()}
        for module in modules.values():
            module.train(self.official)
        with self.runtime.phase("refresh"), traceless(modules):
            for batch in data.test_batches(1):
                self.runtime.check_stop()
                value = alone(loss, batch)
                weight = (-value.detach()).exp() if self.official else 1.0
                for name, g in zip(weights, gradients(value, list(weights.values())), strict=True):
                    total[name] += weight * g.square()
        mean = {name: f / len(data) for name, f in total.items()}
        self.fisher = {name: DECAY * self.fisher.get(name, torch.zeros_like(f)) + f for name, f in mean.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"fisher": self.fisher}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fisher = moved(state["fisher"], self.runtime.device) or {}


def by_name(modules: Modules) -> dict[str, nn.Parameter]:
    """The trainable parameters of all parts: {"part.name": parameter}."""
    return {f"{part}.{name}": p for part, module in modules.items() for name, p in trained(module).items()}


def alone(loss: Callable[[Any], Tensor], batch: Any) -> Tensor:
    """The loss of a batch of one; `UserError` where batch normalisation has nothing to normalise by."""
    try:
        return loss(batch)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        advice = "choose learner.refresh={fisher: none} or model.norm=group"
        raise UserError(f"learner.refresh measures sample by sample, which batch normalisation cannot: {advice}") from None


@contextlib.contextmanager
def traceless(modules: Modules) -> Iterator[None]:
    """What passes change besides gradients is as before: statistics of normalisation, torch's random numbers."""
    kept = [(buffer, buffer.clone()) for module in modules.values() for buffer in module.buffers()]
    devices = {p.device for module in modules.values() for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)):
        yield
    for buffer, old in kept:
        buffer.copy_(old)
