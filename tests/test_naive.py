"""Every rewrite against the naive version: the same learner, computed as published code does it, gives the same answers.

Both see the same batches, modules, heads and dropout; what differs is who makes the pixels (PIL: within 1/255), the arithmetic,
and how often a thing is computed. Alignment draws other samples, so it is left out where it is compared.
"""

from dataclasses import replace

import pytest
import torch

from clbench.bench import naive, needed
from clbench.config.compose import compose
from clbench.records.rows import rows_of
from clbench.records.tables import tables
from clbench.run import runner
from clbench.run.image_stream import ImageStream, make_runtime
from clbench.run.loop import Loop
from clbench.streams.eval_sets import open_eval

STREAM = ("scenario.num_classes=6", "scenario.limit_train=16", "scenario.limit_test=8", "scenario.budget.epochs=2")
COMMON = ("scenario.augment=none", "feature_store=off", "device=cpu", "num_threads=1", "seed=1", *STREAM)
CASES = {
    "ncm": ("learner=ncm",),
    "simplecil": ("learner=ncm", "learner.metric=cosine"),
    "fecam": ("learner=fecam",),
    "ranpac": ("learner=ranpac", "learner.projection=300", "learner.ridge=10"),
    "ranpac without module": ("learner=ranpac", "pet=none", "learner.projection=0", "learner.ridge=1"),
    "aper": ("learner=aper",),
    "aper whole network": ("learner=aper", "pet=none"),
    "finetune": ("learner=finetune", "learner.batch_size=16"),
    "slca": ("learner=slca", "learner.align_epochs=0", "learner.batch_size=16"),
    "lae": ("learner=lae", "learner.lr=0.01"),
    "ease": ("learner=ease",),
    "mos": ("learner=mos", "learner.align_epochs=0", "learner.lr=0.1"),
    "mos of the paper": ("learner=mos", "learner.align_epochs=0", "learner.variant=paper"),
}


def fast(job):
    """The learner of a job after all experiences, evaluated after each -> accuracies as the naive version counts them."""
    from clbench.run import provenance

    with runner.closing(runner.tracking.open_tracker("none", job.folder, {}, None)) as tracker:
        runtime = make_runtime(job)
        learner = runner.build(job.config["learner"], model=job.model, runtime=runtime)
        stream = ImageStream(job, runtime, learner)
        loop = Loop(job, runtime, learner, stream, provenance.describe(job, []), None, tracker)
        for index in range(len(job.scenario.manifest.experiences)):
            loop.learn(index)
            loop.evaluate(index)
    return tables(rows_of(loop.finish()))


def prepared(tmp_path, *words):
    return runner.prepare(compose([*words, *COMMON, f"results_dir={tmp_path}"])[0])


@pytest.mark.parametrize("name", CASES)
def test_the_same_answers_and_the_needed_passes(name, tmp_path):
    entry = fast(prepared(tmp_path, *CASES[name], "arithmetic=medium+explicit"))
    job = prepared(tmp_path, *CASES[name], "arithmetic=reference")
    stage = naive.run(job, workers=0)
    n = entry["n"]
    ours = [sum(row[j] for j in range(t + 1)) / sum(n[: t + 1]) for t, row in enumerate(entry["correct"])]
    assert len(ours) == len(stage.accuracy) == 3
    assert ours == pytest.approx(stage.accuracy, abs=1.01 / n[0]), "another learner than the naive one"

    stream = needed.stream_of(job)
    made = needed.KNOWN[job.config["names"]["learner"]](stream)
    assert entry["passes"]["train"] == made.full + made.adapter, "training passes"
    if "mos" in name:
        walks = sum(stream.test) * (len(stream.train) - 1)
        assert made.forward <= entry["passes"]["eval"] <= made.forward + walks
        statistics = 2 * sum(stream.train) - stream.train[0]
        assert entry["passes"]["eval"] - statistics <= 2.5 * stream.tested, "passes of a test image and task"
    else:
        assert entry["passes"]["eval"] == made.forward, "an image passed more often than it needs to"
    passes = job.model.passes
    assert passes["train"] + passes["eval"] == official(name, stream, job.config["learner"]), "the naive version's own passes"


def official(name, stream, options):
    """Passes of published code, from its loops: methods' loggings included."""
    n, tested, e = sum(stream.train), stream.tested, stream.epochs
    first = e * stream.train[0] + e * stream.test[0]  # first session with a look at the test images after each epoch
    if name in ("ncm", "simplecil", "fecam", "ranpac without module"):
        return n + tested
    if name == "ranpac":
        return first + n + tested
    if name.startswith("aper"):
        return first + 2 * (n + tested)
    if name == "finetune":
        return e * n + tested
    if name == "slca":
        return e * n + e * n + n + tested
    if name == "lae":
        return sum(e * (x // 24 * 24) for x in stream.train) + 2 * tested
    grown = sum((t + 1) * x for t, x in enumerate(stream.train))
    seen = [sum(stream.test[: t + 1]) for t in range(len(stream.test))]
    if name == "ease":
        return e * n + grown + sum((t + 1) * s for t, s in enumerate(seen))
    return e * n + 2 * n + sum((t + 2) * s for t, s in enumerate(seen))


def test_what_has_no_naive_version_says_so(tmp_path):
    job = prepared(tmp_path, "learner=ewc")
    with pytest.raises(runner.UserError, match="ewc has no naive version"):
        naive.run(job, 0)
    job = prepared(tmp_path, "learner=ncm")
    job.scenario = replace(job.scenario, manifest=replace(job.scenario.manifest, discloses_task=True))
    with pytest.raises(runner.UserError, match="class-incremental"):
        naive.run(job, 0)


def test_the_views_are_the_pipelines(tmp_path):
    job = prepared(tmp_path, "learner=ncm")
    from clbench.training.runtime import Runtime

    stage = naive.Stage(job, Runtime(0, job.device, job.scenario.budget))
    experience = next(stage.experiences())
    ours = next(open_eval(job.scenario, 0, job.pipeline).data.test_batches(8)).x
    theirs = next(iter(stage.tests(experience, 8)))[1]
    worst = (ours - theirs).abs().max() * max(job.pipeline.profile.std)
    assert worst <= 1.001 / 255 * max(1.0, max(job.pipeline.profile.std) / min(job.pipeline.profile.std))
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0)
