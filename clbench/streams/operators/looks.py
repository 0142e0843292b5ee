"""Looks inside an experience: the learner is evaluated while it learns, not at the end alone."""

from __future__ import annotations

from dataclasses import replace

from clbench.interfaces import UserError
from clbench.streams.operators.copies import whole
from clbench.streams.scenario import Scenario


def looks(stream: Scenario, number: int | None = None, every: int | None = None) -> Scenario:
    """The same stream with looks after given numbers of an experience's samples (a sample counts each time it is visited).

    number  looks evenly spread over the passes of the budget
    every   or: after each so many samples

    The end of an experience is evaluated in any case. Only learners that can be asked inside `learn` take part (capability
    `anytime`); what they are trained to does not depend on looks.
    """
    if (number is None) == (every is None):
        raise UserError("looks needs one of number and every, such as {looks: {number: 8}}")
    whole(number if every is None else every, "looks.number" if every is None else "looks.every")
    if 0 in (number, every):
        raise UserError("looks.number and looks.every must be at least 1")
    places = []
    for i, entry in enumerate(stream.manifest.experiences):
        visits = len(entry.train) * stream.budget_of(i).epochs
        if every is None:
            assert number is not None
            found = {-(-visits * k // (number + 1)) for k in range(1, number + 1)}
        else:
            found = set(range(every, visits, every))
        places.append(tuple(sorted(place for place in found if 0 < place < visits)))
    if not any(places):
        most = max(len(entry.train) * stream.budget_of(i).epochs for i, entry in enumerate(stream.manifest.experiences))
        raise UserError(f"looks has no effect: no experience has more than {most} visits to its samples")
    return replace(stream, manifest=replace(stream.manifest, looks=tuple(places)))
