"""Which model reads which stream: a decoder tokens, an autoencoder images, a classifier labelled images."""

from __future__ import annotations

from typing import Any

from clbench.interfaces import UserError
from clbench.streams.tokens.image_scenario import ImageScenario
from clbench.streams.tokens.scenario import TokenScenario


def build_model(build: Any, config: dict[str, Any], scenario: Any) -> Any:
    """The model, if it can read the stream. What it leaves open (vocab and context null) is the stream's."""
    node = config["model"]
    if isinstance(scenario, ImageScenario):
        return build_autoencoder(build, node, scenario)
    refuse_autoencoder(node, scenario)
    if not isinstance(scenario, TokenScenario):
        if "profile" not in node and "vocab" in node:
            raise UserError(f"model {node.get('name')} reads tokens: scenario {scenario.name} is made of images")
        if option := next((name for name in ("micro_batch", "compile") if config.get(name)), None):
            raise UserError(f"{option} has no effect in scenario {scenario.name}, which is made of images")
        return build(node)
    wanted = {"vocab": scenario.manifest.vocab, "context": scenario.manifest.context}
    model = build(node, **{name: value for name, value in wanted.items() if name in node and node[name] is None})
    if not callable(getattr(model, "loss", None)):
        raise UserError(f"model {node.get('name')} has no loss: scenario {scenario.name} needs a decoder_... model")
    for name, needs in wanted.items():
        has = model.identity.get(name)
        if isinstance(has, int) and has < needs:
            raise UserError(f"model {node.get('name')} has {name} {has}, scenario {scenario.name} needs {needs}")
    return model


def build_autoencoder(build: Any, node: dict[str, Any], scenario: ImageScenario) -> Any:
    """The model of a stream of images, if it can read it; what it leaves open (image null) is the stream's."""
    if "vocab" in node:
        raise UserError(
            f"model {node.get('name')} reads tokens: scenario {scenario.name} is made of images and needs a mae_... model"
        )
    asked = node.get("image")
    if isinstance(asked, int) and asked != scenario.side:
        hint = f"set model.image={scenario.side} or scenario.size={asked}"
        raise UserError(
            f"model {node.get('name')} reads images of {asked} pixels, scenario {scenario.name} has {scenario.side}: {hint}"
        )
    model = build(node, **({"image": scenario.side} if "image" in node and asked is None else {}))
    for name in ("loss", "features"):  # the second is for the linear probe
        if not callable(getattr(model, name, None)):
            raise UserError(f"model {node.get('name')} has no {name}: scenario {scenario.name} needs a mae_... model")
    return model


def refuse_autoencoder(node: dict[str, Any], scenario: Any) -> None:
    """A masked autoencoder answers no other question than its own."""
    if "mask" not in node or "decoder_depth" not in node:
        return
    if isinstance(scenario, TokenScenario):
        raise UserError(
            f"model {node.get('name')} reads images: scenario {scenario.name} is made of tokens and needs a decoder_... model"
        )
    raise UserError(
        f"model {node.get('name')} is a masked autoencoder: scenario {scenario.name} asks for classes, cpt_mae_... ones do not"
    )
