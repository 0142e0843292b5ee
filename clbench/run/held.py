"""What a learner holds after an experience, against the budget of its stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clbench.interfaces import UserError
from clbench.training.state import num_bytes

if TYPE_CHECKING:
    from clbench.run.runner import Job


def held(job: Job, learner: Any, index: int, state: Mapping[str, Any]) -> dict[str, Any]:
    """Kept samples, their bytes, bytes of everything else in `state`; `UserError` where the budget allows less."""
    memory = getattr(learner, "memory", None) if job.capabilities.stores_exemplars else None
    count, size = (0, 0) if memory is None else (len(memory), memory.num_bytes())
    used = {"exemplars": count, "exemplar_bytes": size, "stored_bytes": num_bytes(state) - size}
    for name, value in used.items():
        limit = getattr(job.scenario.budget, name)
        if limit is not None and value > limit:
            raise UserError(f"experience {index}: the learner holds {value} {name}, the scenario's budget allows {limit}")
    return used
