"""Presets of `clbench bench`: what a name measures. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One learner on one stream: `overrides` come after the preset's. `most_seconds` is a target of its own."""

    name: str
    overrides: tuple[str, ...]
    naive: bool = True
    most_seconds: float | None = None
    least_ratio: dict[str, float] | None = None


@dataclass(frozen=True)
class Preset:
    """Cases under common overrides, each in every precision; rates that must be reached; a sweep over seeds.

    share   of the floor that every case must reach
    rates   least images per second by kind, in the last of `precisions`
    """

    about: str
    overrides: tuple[str, ...]
    cases: tuple[Case, ...]
    precisions: tuple[str, ...] = ("fp32",)
    share: float | None = None
    rates: dict[str, float] | None = None
    sweep: tuple[Case, ...] = ()
    seeds: int = 10
    sweep_ratio: float = 10.0


CIFAR20 = (
    "scenario=cil_cifar100",
    "scenario.num_classes=20",
    "scenario.increment=5",
    "scenario.order=natural",
    "scenario.limit_train=50",
    "scenario.limit_test=25",
    "model=vit_tiny",
    "device=cpu",
)
CIFAR50 = ("scenario.num_classes=50", "scenario.limit_train=20", "scenario.limit_test=10")
ORDERS = ("scenario.order=random",)

CASES = (
    Case("simplecil", ("learner=ncm", "learner.metric=cosine")),
    Case("slca", ("learner=slca", "learner.epochs=4", "learner.align_epochs=3", "learner.batch_size=32")),
    Case("mos", ("learner=mos", "learner.epochs=4")),
    Case("mos 10 x 5", ("learner=mos", "learner.epochs=2", *CIFAR50)),
    Case("lae", ("learner=lae", "learner.epochs=5", "learner.freeze=0.4")),
    Case("ranpac", ("learner=ranpac", "learner.epochs=4", "learner.projection=2000")),
    Case("aper", ("learner=aper", "learner.epochs=4")),
    Case("ease", ("learner=ease", "learner.epochs=2")),
)
SWEEP = (
    Case("ncm", ("learner=ncm", *ORDERS)),
    Case("ranpac", ("learner=ranpac", "pet=none", "learner.projection=2000", *ORDERS)),
    Case("fecam", ("learner=fecam", *ORDERS)),
)
LORA = (
    Case("inflora", ("learner=inflora", "learner.epochs=4"), False),
    Case("sd_lora", ("learner=sd_lora", "learner.epochs=4"), False),
    Case("lae lora", ("learner=lae", "pet=lora_lae", "learner.epochs=5", "learner.freeze=0.4")),
    Case("finetune lora", ("learner=finetune", "pet=lora", "learner.epochs=4"), False),
)
SCRATCH = (
    *CIFAR20[:-2],
    "scenario.limit_train=200",
    "model=resnet18_slim",
    "device=cpu",
)
RATIOS = {"simplecil": {"bf16": 5.0}, "slca": {"bf16": 4.5}, "mos 10 x 5": {"bf16": 7.0}}

FULL = ("scenario=cil_cifar100", "model=vit_base", "device=cuda", "precision=bf16", "scenario.budget.epochs=20")

PRESETS = {
    "quick": Preset(
        "digits with the embedded network: does everything work, in a minute or two",
        ("scenario.num_classes=6", "scenario.limit_train=20", "scenario.limit_test=10", "scenario.budget.epochs=2"),
        (
            *(Case(name, (f"learner={name}",)) for name in ("ncm", "slca", "mos", "lae", "ease", "aper")),
            Case("ranpac", ("learner=ranpac", "learner.projection=500")),
        ),
    ),
    "cpu_targets": Preset(
        "ViT-Tiny at 224 px, 20 classes of CIFAR-100, fp32 and bf16, a sweep of 10 seeds; about an hour on two idle cores",
        CIFAR20,
        tuple(Case(c.name, c.overrides, least_ratio=RATIOS.get(c.name)) for c in CASES),
        precisions=("fp32", "bf16"),
        share=0.8,
        sweep=SWEEP,
    ),
    "lora": Preset(
        "learners with low-rank modules: ViT-Tiny at 224 px, 20 classes of CIFAR-100, fp32; half an hour on two idle cores",
        CIFAR20,
        LORA,
    ),
    "scratch": Preset(
        "ResNet-18 with 20 maps from random weights at 32 px, 20 classes of CIFAR-100, fp32; some minutes on two idle cores",
        SCRATCH,
        (
            Case("finetune", ("learner=finetune", "learner.backbone_lr=0.01", "learner.epochs=5")),
            Case("finetune 10", ("learner=finetune", "learner.backbone_lr=0.01", "learner.epochs=1", "learner.batch_size=10")),
        ),
    ),
    "vit_base_h200": Preset(
        "ViT-B/16 at 224 px in bf16 on one large GPU: rates, MOS on CIFAR-100 B0 Inc5, SLCA and InfLoRA B0 Inc10; half an hour",
        FULL,
        (
            Case("mos B0 Inc5", ("learner=mos", "scenario.increment=5"), False, 360.0),
            Case("slca B0 Inc10", ("learner=slca", "scenario.increment=10"), False, 480.0),
            Case("inflora B0 Inc10", ("learner=inflora", "scenario.increment=10"), False),
            Case("sd_lora B0 Inc10", ("learner=sd_lora", "scenario.increment=10"), False),
        ),
        precisions=("bf16",),
        rates={"forward": 11_000.0, "full": 3_800.0},
    ),
}
