"""Hidden units of a network: which layer makes them, which one layer reads them.

A unit is an output of a Linear layer or a channel of a Conv2d. It counts as hidden where all that it does goes, through
functions of one unit at a time (activations, pooling, BatchNorm, flattening), into one other layer, or into the classifier.
Then it can be gated, or replaced, without regard to the rest: layers whose output joins a residual sum, or is normalised or
attended together with others, have no hidden units. In a multilayer perceptron or a plain convolutional network all layers
have; in a ResNet the inner one of a block, in a ViT the hidden layer of each MLP.

They are found by one pass: the graph that autograd records is walked back from the input of every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

LAYERS = (nn.Linear, nn.Conv2d)
APART = (  # names of autograd's functions that keep units apart
    "Relu", "LeakyRelu", "PreluKernel", "Gelu", "Silu", "Elu", "Tanh", "Sigmoid", "Hardtanh", "Hardswish", "Softplus", "Mish",
    "Mul", "Div", "Add", "View", "UnsafeView", "ReshapeAlias", "Clone", "Alias", "Squeeze", "Mean", "MaxPool2DWithIndices",
    "AvgPool2D", "AdaptiveAvgPool2D", "MkldnnMaxPool2D", "NativeBatchNorm", "CudnnBatchNorm", "NativeDropout", "ToCopy",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Units:
    """Hidden units of one layer.

    norm    BatchNorm between the layer and its reader, or None
    reader  the layer that reads them; None: the classifier, they are the features
    each    inputs of the reader that a unit has (flattened pixels), which lie side by side
    """

    name: str
    layer: nn.Linear | nn.Conv2d
    norm: nn.Module | None
    reader: nn.Linear | nn.Conv2d | None
    count: int
    each: int

    def apart(self, x: Tensor) -> Tensor:
        """The input of the reader, or features -> [N, count, M]: N samples (or tokens) of M pixels."""
        if isinstance(self.reader, nn.Conv2d):
            return x.flatten(2)
        return x.reshape(-1, self.count, self.each)

    def gated(self, x: Tensor, gate: Tensor) -> Tensor:
        """The input of the reader, or features, with every unit times its gate [count]."""
        if isinstance(self.reader, nn.Conv2d):
            return x * gate[:, None, None]
        return x * gate.repeat_interleave(self.each)

    def outgoing(self, head: nn.ModuleList) -> list[tuple[Tensor, Tensor | None]]:
        """Weights that read the units, as views [K, count, M], with the biases [K]; of features those of the head's blocks."""
        readers: list[Any] = list(head) if self.reader is None else [self.reader]
        return [(one.weight.view(len(one.weight), self.count, -1), one.bias) for one in readers]


def hidden_units(model: Any) -> list[Units]:
    """Hidden units of a network's layers, in the order in which they run. `model` is a `Backbone`; nothing of it changes."""
    made: dict[Any, nn.Module] = {}  # function of autograd -> the layer, or the BatchNorm, whose output it gave
    read: list[tuple[nn.Module | None, Any, int]] = []  # reader, the function behind its input, width of the input
    hooks = []

    def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        made[out.grad_fn] = module
        if isinstance(module, LAYERS):
            read.append((module, args[0].grad_fn, args[0].shape[1 if isinstance(module, nn.Conv2d) else -1]))

    modes, passes = [(m, m.training) for m in model.modules()], dict(model.passes)
    asked = [(p, p.requires_grad) for p in model.parameters()]
    names: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, (*LAYERS, _BatchNorm))
    }
    try:
        model.eval()
        for p, _ in asked:
            p.requires_grad_()
        hooks = [module.register_forward_hook(note) for module in names]
        size, device = model.profile.size, next(model.parameters()).device
        with torch.enable_grad():
            features = model.features(torch.zeros(2, 3, size, size, device=device))
        read.append((None, features.grad_fn, features.shape[1]))
        return _paired(made, read, names)
    finally:
        for hook in hooks:
            hook.remove()
        for p, wanted in asked:
            p.requires_grad_(wanted)
        for module, mode in modes:
            module.training = mode
        model.passes.update(passes)


def _paired(made: dict[Any, nn.Module], read: list[Any], names: dict[nn.Module, str]) -> list[Units]:
    """The layers that one reader reads alone."""
    sources = [(reader, *_behind(function, made), width) for reader, function, width in read]
    readers: dict[nn.Module, int] = {}
    for _, layers, *_ in sources:
        for layer in layers:
            readers[layer] = readers.get(layer, 0) + 1
    calls = list(made.values())
    found = []
    for reader, layers, norms, apart, width in sources:
        if len(layers) != 1 or not apart or len(norms) > 1:
            continue
        (layer,) = layers
        count = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        grouped = any(getattr(one, "groups", 1) > 1 for one in (layer, reader))
        if readers[layer] == 1 and calls.count(layer) == 1 and width % count == 0 and not grouped:
            found.append(Units(names[layer], layer, next(iter(norms), None), reader, count, width // count))
    order = list(names)
    return sorted(found, key=lambda one: order.index(one.layer))


def _behind(function: Any, made: dict[Any, nn.Module]) -> tuple[list[Any], list[nn.Module], bool]:
    """Layers whose outputs a value is made of, BatchNorms on the way, and whether all on the way keeps units apart."""
    layers: list[Any] = []
    norms: list[nn.Module] = []
    apart, ahead, seen = True, [function], set()
    while ahead:
        now = ahead.pop()
        if now is None or now in seen:
            continue
        seen.add(now)
        module = made.get(now)
        if isinstance(module, LAYERS):
            layers.append(module)
            continue
        if module is not None:
            norms.append(module)
        kind = now.name().partition("Backward")[0].removeprefix("torch::autograd::")
        if kind == "AccumulateGrad":
            continue
        apart = apart and kind in APART
        ahead += [before for before, _ in now.next_functions]
    return layers, norms, apart


def keep_statistics(model: nn.Module) -> None:
    """BatchNorm uses its stored statistics and does not change them, whatever the rest does."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
