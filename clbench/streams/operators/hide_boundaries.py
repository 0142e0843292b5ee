"""Hidden boundaries: a learner is not told where an experience ends."""

from __future__ import annotations

from dataclasses import replace

from clbench.interfaces import UserError
from clbench.streams.scenario import Scenario


def hide_boundaries(stream: Scenario) -> Scenario:
    """No boundary is announced (task-free): only learners take part that do nothing at the end of an experience.

    They declare `needs_boundaries=False`; all others are refused before a run. A stream that discloses tasks tells its
    boundaries with them and is refused.
    """
    manifest = stream.manifest
    if manifest.discloses_task:
        raise UserError(f"operator hide_boundaries: scenario {stream.name} discloses tasks, which tell where experiences end")
    if not any(e.boundary for e in manifest.experiences):
        raise UserError("operator hide_boundaries has no effect: no boundary is announced")
    steps = tuple(replace(e, boundary=False) for e in manifest.experiences)
    return replace(stream, manifest=replace(manifest, experiences=steps))
