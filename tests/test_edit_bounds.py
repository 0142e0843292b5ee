"""What bounds the values of editors, and what old text tells: the two options that tell why a stream of edits collapses."""

import numpy as np
import pytest
import torch

from clbench.interfaces import UserError
from clbench.learners.emmet import Emmet
from clbench.learners.memit import Memit
from clbench.learners.rome import Rome
from clbench.models.decoder import build_decoder
from clbench.streams.tokens import facts
from clbench.streams.tokens.edits import edit_facts
from clbench.streams.tokens.facts import World
from clbench.training.editing.site import Site
from clbench.training.editing.value_search import Search, find_value, output_at, size_given, weights_given
from clbench.training.runtime import Runtime
from clbench.training.state import detached

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stream():
    return edit_facts(name="tried", edits=4, entities=64, looks=[2, 4], neighbours=1, known=0)


def decoder():
    return build_decoder(name="tried", vocab=facts.VOCAB, context=64, width=16, depth=3, heads=2, parallel=False).eval()


def learned(cls, stream, number=2, **options):
    runtime = Runtime(0, CPU, stream.budget)
    learner = cls(decoder(), runtime, contexts=2, context=4, **options)
    for index in range(number):
        experience = stream.experience(index)
        runtime.begin(index, len(experience.train), experience.budget)
        learner.learn(experience)
    return learner


@pytest.mark.parametrize("of_block", [False, True])
@torch.no_grad()
def test_the_size_of_the_model_as_given(stream, of_block):
    """Whatever was done to the weights: that of an untouched copy, and the weights are as they were."""
    model, fresh, request = decoder(), decoder(), stream.questions.requests[0]
    sites = [Site(model, layer) for layer in (0, 1)]
    given = weights_given(sites)
    for site in sites:
        site.linear.weight.mul_(7)
    edited = weights_given(sites)
    module = fresh.layers[1] if of_block else fresh.layers[1].mlp["dense_4h_to_h"]
    expected = output_at(fresh, module, torch.from_numpy(request.prompt)[None], request.subject)[0]
    assert size_given(sites, given, request, CPU, of_block) == float(expected.norm())
    assert all(torch.equal(site.linear.weight, weight) for site, weight in zip(sites, edited, strict=True))
    now = output_at(model, model.layers[1] if of_block else sites[1].linear, torch.from_numpy(request.prompt)[None], 1)[0]
    assert float(now.norm()) > 2 * float(expected.norm())


def test_a_value_ends_at_its_bound(stream):
    model, request = decoder(), stream.questions.requests[0]
    site, runtime = Site(model, 0), Runtime(0, CPU, stream.budget)
    runtime.begin(0, 1, stream.budget)
    search = Search(lr=10.0, steps=4, clamp=0.5, kl=0.0, decay=0.0)
    for size in (None, 3.0, 12.0):
        delta_D, start_D = find_value(runtime, site, request, np.zeros((0, 4), np.int64), search, size=size)
        bound = 0.5 * (float(start_D.norm()) if size is None else size)
        assert float(delta_D.norm()) == pytest.approx(bound, rel=1e-5), "steps of 10 reach any bound"


@pytest.mark.parametrize("cls", [Rome, Memit, Emmet])
def test_values_of_a_bloated_layer_grow_with_it_unless_they_are_bounded_by_the_model_as_given(stream, cls):
    """One edit of a layer with weights 20 times as large: the change is as much larger, or about as large as before."""
    changes = {}
    for by, times in (("now", 1.0), ("start", 1.0), ("now", 20.0), ("start", 20.0)):
        runtime = Runtime(0, CPU, stream.budget)
        runtime.begin(0, 2, stream.budget)
        learner = cls(decoder(), runtime, contexts=2, context=4, layers=[0], **LARGE) if cls is not Rome else None
        learner = learner or cls(decoder(), runtime, contexts=2, context=4, layer=0, variant="p_rome", **LARGE)
        editor = learner.editor if cls is Emmet else learner
        editor.given = weights_given([editor.site] if cls is Rome else editor.sites) if by == "start" else []
        linear = learner.model.layers[0].mlp["dense_4h_to_h"]
        with torch.no_grad():
            linear.weight.mul_(times)
        before = linear.weight.detach().clone()
        learner.learn(stream.experience(0))
        changes[by, times] = float((linear.weight.detach() - before).norm())
    assert changes["start", 1.0] == pytest.approx(changes["now", 1.0], rel=0.3)  # the second of the two edits differs
    assert changes["now", 20.0] > 3 * changes["now", 1.0]
    assert changes["start", 20.0] < changes["now", 20.0] / 2


LARGE = {"lr": 10.0, "steps": 3, "clamp": 1.0, "kl": 0.0, "decay": 0.0}


@pytest.mark.parametrize("cls", [Rome, Memit, Emmet])
def test_weights_as_given_are_part_of_the_state(stream, cls):
    whole = learned(cls, stream, steps=3, clamp_by="start")
    half = detached(learned(cls, stream, 1, steps=3, clamp_by="start").state_dict())
    assert torch.equal(half["given"][0], decoder().layers[0].mlp["dense_4h_to_h"].weight)
    runtime = Runtime(0, CPU, stream.budget)
    learner = cls(decoder(), runtime, contexts=2, context=4, steps=3, clamp_by="start")
    learner.load_state_dict(half)
    runtime.begin(1, 2, stream.budget)
    learner.learn(stream.experience(1))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, learner.model.state_dict()[name]), name
    assert "given" not in learned(cls, stream, 0).state_dict()
    with pytest.raises(UserError, match=r"learner\.clamp_by must be now or start, got 'first'"):
        learned(cls, stream, 0, clamp_by="first")


def test_old_text_of_all_subjects(stream):
    """It tells the true facts of those that are edited too, never the new ones; what is asked stays the same."""
    full = edit_facts(name="tried", edits=4, entities=64, looks=[2, 4], neighbours=1, known=0, all_told=True).questions
    part, world = stream.questions, World(64, 0)
    assert full.requests[3].prompt.tolist() == part.requests[3].prompt.tolist() and (full.old == part.old).all()
    assert full.sha256() != part.sha256() and full.text.shape == part.text.shape
    edited = {tuple(world.subjects[e]) for e in world.entities("edit")}
    true = {tuple(s) for e in world.entities("edit") for r in range(5) for t in range(6)
            for s in world.sentences(np.array([e]), np.array([r]), np.array([t]))}  # fmt: skip
    found = []
    for row in full.text:
        told = [row[i : i + 8] for i in range(57) if tuple(row[i : i + 2]) in edited]
        found += [tuple(sentence) for sentence in told]
    assert len(found) > 100 and set(found) <= true
    assert not any(tuple(row[i : i + 2]) in edited for row in part.text for i in range(63))
    with pytest.raises(UserError, match=r"scenario\.all_told must be true or false, got 1"):
        edit_facts(name="tried", edits=4, all_told=1)
