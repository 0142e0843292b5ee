"""First-session adaptation: train a PET, or the whole backbone, on the first experience with a cosine classifier, then stop.

APER (Zhou et al., IJCV 2024), RanPAC (McDonnell et al., NeurIPS 2023), and FeCAM as PILOT has it, begin like this:
cross-entropy of sigma cos(f, w_c), sigma learnable and 1 at the start, both trained at one rate.
FeTrIL (Petit et al., WACV 2023) begins with a linear classifier.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from clbench.interfaces import Batch, Experience
from clbench.models.heads import CosineHead, LinearHead
from clbench.streams.images.data import shuffled
from clbench.training.fit import Recipe, fit
from clbench.training.runtime import Runtime
from clbench.training.state import groups_of
from clbench.training.steps import guided


def adapt(
    runtime: Runtime,
    learner: Any,
    tuned: nn.Module,
    model: Any,
    head: CosineHead | LinearHead,
    experience: Experience,
    *,
    lr: float,
    epochs: int,
    batch_size: int,
    recipe: Recipe,
) -> dict[str, float]:
    """Train `tuned` and `head` on the first experience; both must be in the learner's state -> numbers for the log.

    model  whose `features` are classified; `tuned` is its PET or itself
    """
    head.grow(len(experience.new_classes), runtime.generator("head"))
    tuned.train()

    def loss(batch: Batch) -> Tensor:
        assert batch.y is not None
        return F.cross_entropy(head(model.features(batch)), batch.y)

    batches = shuffled(experience.train, batch_size, epochs, runtime.key("train"))
    total, hooks = guided(tuned, experience.train, loss)
    log = fit(runtime, "adapt", learner, groups_of((tuned, lr), (head, lr)), total, batches, recipe, **hooks)
    tuned.eval()
    return log
