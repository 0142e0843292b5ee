"""Small networks that are trained from scratch, by name: mlp, convnet, resnet18_slim, resnet18_cifar, resnet32.

They speak timm's language (`num_features`, `forward_features`, `forward_head`): a `Backbone` is made of them as of any other.
All take images [B, 3, S, S]; `norm` stands behind every convolution, or linear layer of the MLP:

  batch  BatchNorm, with running statistics in evaluation mode
  group  GroupNorm (Wu & He, ECCV 2018, arXiv 1803.08494), the largest number of groups up to 8 that divides the channels:
         no statistics of a batch, nothing that a later task overwrites unseen
  none   no layer. A residual branch then starts as zero (its last convolution is 0)

Sources: MLPs of 2 x 100 (GEM, arXiv 1706.08840; Mammoth), 2 x 256 (A-GEM), 2 x 400 (MIR; van de Ven & Tolias) hidden units;
the convolutional network of Zenke, Poole & Ganguli (ICML 2017, arXiv 1703.04200), here without dropout and with padding
everywhere; the ResNet-18 of GEM with 20 maps instead of 64, 160 features; ResNet-18 with a 3x3 stem and 64 maps; ResNet-32
(He et al., CVPR 2016), 64 features, whose residual branches start as zero under any norm. MLPs and `convnet` start with uniform
weights after Glorot & Bengio (2010) and biases 0, ResNets with normal ones after He et al. (2015).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from clbench.interfaces import UserError

Norm = Literal["batch", "group", "none"]
RESNETS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # blocks and maps of each stage
    "resnet18_slim": ((2, 2, 2, 2), (20, 40, 80, 160)),
    "resnet18_cifar": ((2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet32": ((5, 5, 5), (16, 32, 64)),
}
NAMES = ("mlp", "convnet", *RESNETS)


def drawn(name: str, options: dict[str, Any], norm: str) -> nn.Module:
    """A network with random weights from torch's global generator. `UserError` for a norm or options that it does not have."""
    if norm not in get_args(Norm):
        raise UserError(f"model.norm must be batch, group or none, got {norm!r}")
    try:
        if name in RESNETS:
            return _resnet(name, norm, options)
        return {"mlp": Mlp, "convnet": ConvNet}[name](norm=norm, **options)
    except TypeError as error:
        raise UserError(f"model.kwargs {options} do not fit {name}: {str(error).partition('() ')[2] or error}") from None


def normalisation(norm: str, channels: int, spatial: bool = True) -> nn.Module:
    """The layer behind `channels` maps, or units where not `spatial`."""
    if norm == "none":
        return nn.Identity()
    if norm == "group":
        return nn.GroupNorm(next(n for n in range(min(8, channels), 0, -1) if channels % n == 0), channels)
    return nn.BatchNorm2d(channels) if spatial else nn.BatchNorm1d(channels)


class _Flat(nn.Module):
    """What networks whose features come out flat have in common with timm's."""

    num_features: int

    def __init__(self, img_size: int):
        super().__init__()
        if isinstance(img_size, bool) or not isinstance(img_size, int) or img_size < 1:
            raise UserError(f"model.kwargs.img_size must be a whole number from 1, got {img_size!r}")
        self.pretrained_cfg = {"input_size": (3, img_size, img_size)}

    def start(self) -> None:
        """Glorot & Bengio's uniform weights, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, 3, S, S] -> [B, D]."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The features as they are: there is no classifier."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, S, S] -> [B, D]."""
        return self.forward_features(x)


class Mlp(_Flat):
    """Pixels through `hidden` layers of (linear, norm, ReLU); the last one's units are the features.

    channels  1: the mean over the colours, so that grey images of S x S pixels are S x S inputs; 3: all colours
    """

    def __init__(self, hidden: Sequence[int] = (400, 400), img_size: int = 28, channels: int = 1, norm: str = "none"):
        super().__init__(img_size)
        if channels not in (1, 3):
            raise UserError(f"model.kwargs.channels must be 1 or 3, got {channels!r}")
        if not hidden or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in hidden):
            raise UserError(f"model.kwargs.hidden must list numbers of units from 1, got {hidden!r}")
        self.channels, self.num_features = channels, hidden[-1]
        sizes = [channels * img_size**2, *hidden]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), normalisation(norm, b, spatial=False), nn.ReLU()) for a, b in pairwise(sizes)
        )
        self.start()

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, 3, S, S] -> [B, D]."""
        x = (x.mean(1) if self.channels == 1 else x).flatten(1)
        for layer in self.layers:
            x = layer(x)
        return x


class ConvNet(_Flat):
    """Stages of two 3x3 convolutions of `maps` channels (each with norm and ReLU) and 2x2 max-pooling, then `hidden` units."""

    def __init__(self, maps: Sequence[int] = (32, 64), hidden: int = 512, img_size: int = 32, norm: str = "batch"):
        super().__init__(img_size)
        numbers = [*maps, hidden]
        if not maps or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
            raise UserError(f"model.kwargs.maps and hidden must be whole numbers from 1, got {maps!r}, {hidden!r}")
        side = img_size // 2 ** len(maps)
        if side < 1:
            raise UserError(f"model.kwargs: images of {img_size} pixels cannot be halved {len(maps)} times")
        self.num_features, layers, before = hidden, [], 3
        for channels in maps:
            for _ in range(2):
                layers += [nn.Conv2d(before, channels, 3, padding=1), normalisation(norm, channels), nn.ReLU()]
                before = channels
            layers.append(nn.MaxPool2d(2))
        self.stages = nn.Sequential(*layers)
        self.dense = nn.Linear(before * side**2, hidden)
        self.start()

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, 3, S, S] -> [B, D]."""
        return self.dense(self.stages(x).flatten(1)).relu()


def _resnet(name: str, norm: str, options: dict[str, Any]) -> nn.Module:
    """Timm's ResNet with basic blocks and a first stage as wide as its stem (7x7, unless the caller puts another there)."""
    layers, channels = RESNETS[name]
    width, more = channels[0], {}
    if norm != "batch":
        more["norm_layer"] = lambda channels, **where: normalisation(norm, channels)
    net: Any = ResNet(BasicBlock, layers=layers, channels=channels, num_classes=0, **more, **options)  # type: ignore[arg-type]
    net.bn1, net.layer1[0] = normalisation(norm, width), BasicBlock(width, width, **more)
    net.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
    if len(layers) == 3:
        net.layer4 = nn.Identity()
    return net


def start(net: ResNet, name: str, norm: str) -> None:
    """Draw the weights of a finished ResNet: He et al.; residual branches of `resnet32`, or without norm, start as zero."""
    net.init_weights(zero_init_last=name not in ("resnet18_slim", "resnet18_cifar"))
    if norm == "none":
        for block in net.modules():
            if isinstance(block, BasicBlock):
                nn.init.zeros_(block.conv2.weight)
