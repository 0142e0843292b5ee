"""Which model reads which stream: a decoder tokens, an autoencoder images, a classifier labelled images."""

from __future__ import annotations

from typing import Any

from clbench.interfaces import UserError
from clbench.models.own_network import backbone_of
from clbench.streams.scenario import Scenario
from clbench.streams.tokens.edits import EditScenario
from clbench.streams.tokens.image_scenario import ImageScenario
from clbench.streams.tokens.scenario import TokenScenario
from clbench.streams.tokens.text_lines import TextScenario


def build_classifier(build: Any, node: dict[str, Any], scenario: Scenario) -> Any:
    """The model of a stream of labelled images."""
    if _is_autoencoder(node):
        why = f"scenario {scenario.name} asks for classes, cpt_mae_... ones do not"
        raise UserError(f"model {node.get('name')} is a masked autoencoder: {why}")
    if "profile" not in node and "vocab" in node:
        raise UserError(f"model {node.get('name')} reads tokens: scenario {scenario.name} is made of images")
    made = build(node)
    return made if hasattr(made, "identity") and hasattr(made, "profile") else backbone_of(made, node)


def build_reader(build: Any, node: dict[str, Any], scenario: TokenScenario | ImageScenario) -> Any:
    """The model of a stream that asks for losses. What the configuration leaves open (null) is the stream's."""
    return (
        build_autoencoder(build, node, scenario)
        if isinstance(scenario, ImageScenario)
        else build_decoder(build, node, scenario)
    )


def build_decoder(build: Any, node: dict[str, Any], scenario: TokenScenario | EditScenario | TextScenario) -> Any:
    """The model of a stream of tokens; `vocab` and `context` may be the stream's."""
    name, needs = node.get("name"), f"scenario {scenario.name} is made of tokens and needs a decoder_... model"
    if _is_autoencoder(node):
        raise UserError(f"model {name} reads images: {needs}")
    wanted = {"vocab": scenario.manifest.vocab, "context": scenario.manifest.context}
    model = build(node, **{option: value for option, value in wanted.items() if option in node and node[option] is None})
    if not callable(getattr(model, "loss", None)):
        raise UserError(f"model {name} has no loss: scenario {scenario.name} needs a decoder_... model")
    for option, least in wanted.items():
        has = model.identity.get(option)
        if isinstance(has, int) and has < least:
            raise UserError(f"model {name} has {option} {has}, scenario {scenario.name} needs {least}")
    return model


def build_autoencoder(build: Any, node: dict[str, Any], scenario: ImageScenario) -> Any:
    """The model of a stream of unlabelled images; `image` may be the stream's."""
    name, needs = node.get("name"), f"scenario {scenario.name} is made of images and needs a mae_... model"
    if "vocab" in node:
        raise UserError(f"model {name} reads tokens: {needs}")
    asked = node.get("image")
    if isinstance(asked, int) and asked != scenario.side:
        hint = f"set model.image={scenario.side} or scenario.size={asked}"
        why = f"model {name} reads images of {asked} pixels, scenario {scenario.name} has {scenario.side}"
        raise UserError(f"{why}: {hint}")
    model = build(node, **({"image": scenario.side} if "image" in node and asked is None else {}))
    for method in ("loss", "features"):  # the second is for the linear probe
        if not callable(getattr(model, method, None)):
            raise UserError(f"model {name} has no {method}: scenario {scenario.name} needs a mae_... model")
    return model


def _is_autoencoder(node: dict[str, Any]) -> bool:
    """Whether a model answers no other question than what a masked autoencoder is asked."""
    return "mask" in node and "decoder_depth" in node
