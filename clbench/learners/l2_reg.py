"""L2 regularisation towards earlier weights, rehearsal-free (Smith, Tian, Halbe, Hsu & Kira, CVPR-W 2023, arXiv 2203.17269,
"A Closer Look at Rehearsal-Free Continual Learning").

    local cross-entropy + (strength / 2) |theta - theta*|^2

over the trained part of the backbone, theta* being its weights at the end of the previous experience (`reference: previous`)
or the pre-trained ones (`pretrained`, from the first experience on). `trainable: qkv` trains the qkv projections alone, with
which the paper reports to beat prompting on ImageNet-R; attention adds the output projections; all is all.

No official code was found; the constants are start values (Adam 5e-5, batch 128: fine-tuning in the CODA-Prompt repository),
and the strength is to be tuned. Published (as quoted by others; the paper's tables were not read): ImageNet-R B0 Inc20,
ViT-B/16 pre-trained on ImageNet-1k, `trainable: qkv`: last 76.06 +- 0.65 %.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from clbench.interfaces import Capabilities, Experience, Schedule
from clbench.learners.regularised import Penalty, Regularised
from clbench.models.backbone import Backbone
from clbench.training.fisher import kept, moved, quadratic_penalty, train_only
from clbench.training.fit import Recipe
from clbench.training.runtime import Runtime
from clbench.training.schedules import cosine
from clbench.training.steps import PartOrTrainable, Project, RefreshOptions, Steps, part_of


class L2Reg(Regularised):
    """State: backbone, head, the pre-trained weights where these are the reference (else: the backbone as learn() finds it)."""

    capabilities: ClassVar[Capabilities] = Capabilities(anytime=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        strength: float = 1.0,
        reference: Literal["previous", "pretrained"] = "previous",
        trainable: PartOrTrainable = "qkv",
        lr: float = 5e-5,  # head
        backbone_lr: float = 5e-5,
        epochs: int | None = None,
        batch_size: int = 128,
        weight_decay: float = 0.0,
        schedule: Schedule = cosine,
        refresh: RefreshOptions = None,  # {variant: official | paper, ...}, see `training/refresh.py`
        project: Project = None,  # bloop: the penalty gives way to the cross-entropy, see `training/bloop.py`
    ):
        train_only(model, part_of(trainable))
        recipe = Recipe("adam", weight_decay=weight_decay, schedule=schedule)
        steps = Steps(runtime, refresh=refresh, trainable=trainable, project=project)
        super().__init__(
            model, runtime, recipe, strength, lr=lr, backbone_lr=backbone_lr, epochs=epochs, batch_size=batch_size, steps=steps
        )
        self.pretrained = kept(model) if reference == "pretrained" else None

    def penalty(self, experience: Experience) -> Penalty | None:
        """Half the squared distance from the reference; from the pre-trained weights in the first experience too."""
        if self.pretrained is None and not experience.index:
            return None
        reference = kept(self.model) if self.pretrained is None else self.pretrained
        return lambda batch, features, z: quadratic_penalty(self.model, reference)

    def state_dict(self) -> dict[str, Any]:
        return self.collect("pretrained")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({**state, "pretrained": moved(state["pretrained"], self.runtime.device)})
