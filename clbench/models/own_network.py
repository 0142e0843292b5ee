"""Networks from outside: any torch.nn.Module with `features` and `num_features` is a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from clbench.interfaces import UserError
from clbench.models import feature_width
from clbench.models.backbone import Backbone
from clbench.models.weights import state_sha256
from clbench.streams.images.pixels import make_profile

SIDE = 32  # pixels of a network that does not say its `image_size`


class _FromOutside(nn.Module):
    """A network from outside in the words of timm's."""

    def __init__(self, own: nn.Module):
        super().__init__()
        self.own, self.num_features = own, own.num_features

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, 3, S, S] -> [B, D]."""
        return self.own.features(x)  # type: ignore[operator]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The features as they are."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, S, S] -> [B, D]."""
        return self.forward_features(x)


def backbone_of(own: Any, node: Mapping[str, Any]) -> Backbone:
    """A `Backbone` of a network that a configuration's `model` named by its dotted path.

    It is a torch.nn.Module with `features(x)`, normalised images [B, 3, S, S] -> [B, D] (in evaluation mode without regard to
    the other images of a batch), and `num_features`, the number D. It may have `image_size` (S, 32) and `profile`, a name of
    `pixels.make_profile` ("small"). It is seen as random unless it was built with `weights`. Anything else raises `UserError`.
    """
    name = str(node.get("name") or str(node["_target_"]).rsplit(".", 1)[-1].rsplit(":", 1)[-1])
    lacks = [word for word in ("features", "num_features") if not hasattr(own, word)]
    if lacks or not isinstance(own, nn.Module) or not callable(own.features):
        what = f"has no {' and no '.join(lacks)}" if lacks else "is no torch.nn.Module with a method features"
        raise UserError(f"model {name} {what}: a model is a torch.nn.Module with features(x) -> [B, D] and num_features, D")
    side, width = getattr(own, "image_size", SIDE), own.num_features
    for word, value in (("num_features", width), ("image_size", side)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"model {name}: {word} must be a whole number from 1, got {value!r}")
    net = _FromOutside(own)
    if (found := feature_width.measured(net, side, name)) != width:
        raise UserError(f"model {name}: num_features is {width}, and its features are {found} wide")
    if not any(p.requires_grad for p in net.parameters()):
        raise UserError(f"model {name} has no parameter that can be trained")
    profile = make_profile(str(getattr(own, "profile", "small")), side)
    identity = {"name": name, "timm": None, "source": str(node["_target_"]), "profile": profile.name, "file_sha256": None}
    identity["state_sha256"] = state_sha256(net.state_dict())
    return Backbone(net, profile, identity, str(node.get("weights")) not in ("none", "None"))
