"""What learners that adapt while they are tested share: statistics of the batch at hand, weights that change, the entropy, the
Fisher information of answers.

No label is seen and no budget is used, so these steps do not go through `fit`; what changes is in the learner's state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from clbench.interfaces import Batch, Experience, UserError
from clbench.training.fisher import Weights, fisher_per_batch
from clbench.training.fit import Recipe
from clbench.training.runtime import Runtime

NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)
Reset = Literal["never", "set", "batch"]


def begins_anew(reset: Reset, batch: Batch) -> bool:
    """Whether adaptation starts from the source again before this batch: at a set's first one, at every one, or at none."""
    return reset == "batch" or (reset == "set" and batch.begins)


def checked_reset(reset: Reset) -> Reset:
    """`UserError` where it is none of those."""
    if reset not in get_args(Reset):
        raise UserError(f"unknown learner.reset={reset}: choose never, set or batch")
    return reset


@contextlib.contextmanager
def batch_statistics(net: nn.Module, prior: float = 0.0) -> Iterator[None]:
    """BatchNorm normalises by the statistics of the batch at hand; stored statistics are neither used nor changed.

    prior  N > 0: (N source + n batch) / (N + n) of mean and variance for a batch of n, without a gradient through them.

    The network must be in evaluation mode. `UserError` for a batch with one value a channel, which has no variance.
    """
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    kept: list[tuple[Any, Any]] = [(m.running_mean, m.running_var) for m in norms]
    hooks = []

    def mix(module: Any, args: tuple[Tensor, ...]) -> None:
        x, (mean, var) = args[0].detach().float(), kept[norms.index(module)]
        across = [d for d in range(x.ndim) if d != 1]
        share = len(x) / (prior + len(x))
        module.running_mean = mean + share * (x.mean(across) - mean)
        module.running_var = var + share * (x.var(across, correction=0) - var)

    for module in norms:
        if prior:
            hooks.append(module.register_forward_pre_hook(mix))
        else:
            module.running_mean = module.running_var = None
    try:
        yield
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        raise UserError("a test batch of one sample has no statistics: set test_time.batch_size to 2 or more") from None
    finally:
        for hook in hooks:
            hook.remove()
        for module, (mean, var) in zip(norms, kept, strict=True):
            module.running_mean, module.running_var = mean, var


@contextlib.contextmanager
def renormalised(net: nn.Module, averages: dict[str, Tensor], moves: bool) -> Iterator[None]:
    """BatchNorm normalises by moving averages of test statistics; gradients go through the batch's (batch renormalisation,
    Ioffe 2017, arXiv 1702.03275, without its bounds).

    averages  by the name of a layer and `.mean` or `.var`; a layer without some takes those of the first batch that comes
    moves     whether they follow the batch, at the layer's momentum (0.1 where it has none), after it was normalised

    Stored statistics are neither used nor changed. Variances are the unbiased ones.
    """
    norms = {name: m for name, m in net.named_modules() if isinstance(m, _BatchNorm)}

    def of(name: str, layer: Any) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            var, mean = torch.var_mean(x.float(), [d for d in range(x.ndim) if d != 1], keepdim=True)
            held_mean = averages.setdefault(f"{name}.mean", mean.detach().clone())
            held_var = averages.setdefault(f"{name}.var", var.detach().clone())
            std, held_std = (var + layer.eps).sqrt(), (held_var + layer.eps).sqrt()
            out = ((x - mean) / std) * (std.detach() / held_std) + (mean.detach() - held_mean) / held_std
            if moves:
                rate = 0.1 if layer.momentum is None else layer.momentum
                held_mean += rate * (mean.detach() - held_mean)
                held_var += rate * (var.detach() - held_var)
            out = layer.weight.view_as(mean) * out + layer.bias.view_as(mean) if layer.affine else out
            return out.to(x.dtype)

        return forward

    for name, layer in norms.items():
        vars(layer)["forward"] = of(name, layer)
    try:
        yield
    finally:
        for layer in norms.values():
            del vars(layer)["forward"]


def affine(net: nn.Module, batch_norm_alone: bool) -> dict[str, Tensor]:
    """Copies of scale and shift of every normalisation layer, by parameter name."""
    kinds = (_BatchNorm,) if batch_norm_alone else NORMS
    found = {}
    for name, module in net.named_modules():
        if isinstance(module, kinds):
            found |= {f"{name}.{own}": p.detach().clone() for own, p in module.named_parameters(recurse=False)}
    return found


def entropy(z: Tensor) -> Tensor:
    """Entropy of the softmax of scores [B, K] in nats -> [B]."""
    log_p = z.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def fisher_batches(experience: Experience, runtime: Runtime, samples: int, size: int = 64) -> Iterator[Batch]:
    """Some of an experience's images in the test view, drawn by seed, `size` at a time; a last one alone is left out."""
    rows = torch.randperm(len(experience.train), generator=runtime.generator("fisher"))[:samples]
    for part in rows.split(size):
        runtime.check_stop()
        if len(part) > 1:  # one image has no statistics of a batch
            yield experience.train.batch(part.numpy())


def fisher_of_answers(net: nn.Module, scores: Callable[[Tensor], Tensor], batches: Iterable[Batch]) -> Weights:
    """Mean over batches of the squared gradient of a batch's mean cross-entropy to the answers themselves, by parameter name.

    scores  images [B, C, H, W] -> logits [B, K] of the network in evaluation mode
    """
    total: Weights = {name: torch.zeros_like(p) for name, p in net.named_parameters() if p.requires_grad}
    number = 0

    def loss(batch: Batch) -> Tensor:
        z_BK = scores(batch.x)
        return F.cross_entropy(z_BK, z_BK.argmax(1))

    with torch.enable_grad():
        for batch in batches:
            number += 1
            for name, squared in fisher_per_batch(net, loss, batch).items():
                total[name] += squared
    return {name: f / max(number, 1) for name, f in total.items()}


def distance(weights: Mapping[str, Tensor], source: Mapping[str, Tensor], importance: Mapping[str, Tensor]) -> Tensor:
    """Sum of importance (theta - source)^2 over `weights` -> scalar; without the half of `fisher.quadratic_penalty`."""
    return torch.stack([(importance[n] * (value - source[n]).square()).sum() for n, value in weights.items()]).sum()


class Adapted:
    """Weights by parameter name that change at test time, and their optimiser; empty before `begin`.

    rates  starts of names -> rates of these in place of `lr`
    """

    def __init__(self, recipe: Recipe, lr: float, rates: Mapping[str, float] | None = None):
        self.recipe, self.lr, self.rates = recipe, lr, rates or {}
        self.weights: dict[str, Tensor] = {}
        self.optimizer: torch.optim.Optimizer | None = None

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Copies of these, and a fresh optimiser."""
        self.weights = {name: value.detach().clone().requires_grad_() for name, value in weights.items()}
        of = {name: next((start for start in self.rates if name.startswith(start)), "") for name in self.weights}
        groups = [
            {"params": [value for name, value in self.weights.items() if of[name] == start], "lr": lr}
            for start, lr in {"": self.lr, **self.rates}.items()
        ]
        self.optimizer = self.recipe.build(groups) if self.weights else None

    def gradients(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        """Of a scalar with respect to each weight, None where it does not depend on one; parameters of the network get none."""
        return torch.autograd.grad(loss, list(self.weights.values()), allow_unused=True)

    def move(self, grads: Sequence[Tensor | None]) -> None:
        """One step of the optimiser along these."""
        assert self.optimizer is not None
        for value, grad in zip(self.weights.values(), grads, strict=True):
            value.grad = grad
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of a scalar."""
        self.move(self.gradients(loss))

    def state_dict(self) -> dict[str, Any]:
        """Weights and moments."""
        moments = {} if self.optimizer is None else self.optimizer.state_dict()["state"]
        return {"weights": {name: value.detach() for name, value in self.weights.items()}, "moments": moments}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        """Go on from there."""
        self.begin({name: value.to(device or value.device) for name, value in state["weights"].items()})
        if self.optimizer is not None:
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state["moments"]})
