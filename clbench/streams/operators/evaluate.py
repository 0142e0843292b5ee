"""Fewer evaluations: after every k-th experience, for streams of hundreds or thousands."""

from __future__ import annotations

from dataclasses import replace

from clbench.interfaces import UserError
from clbench.streams.operators.copies import whole
from clbench.streams.scenario import Scenario


def evaluate(stream: Scenario, every: int = 10) -> Scenario:
    """The learner is evaluated after each `every` experiences, and after the last.

    A record counts the experiences between two evaluations as one: it has a row, a description and a place for each
    evaluation. Time and size are then those of the evaluations asked for.
    """
    if whole(every, "evaluate.every", 2) > len(stream.manifest.experiences):
        number = len(stream.manifest.experiences)
        raise UserError(f"evaluate.every={every}: the stream has {number} experiences, it is evaluated after the last anyway")
    if stream.manifest.looks:
        raise UserError("operator evaluate: looks inside an experience ask for an evaluation after each")
    return replace(stream, manifest=replace(stream.manifest, evaluate_every=every))
