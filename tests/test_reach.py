"""Only its own data is within a learner's reach: handles, the walk that looks for samples of others, the ways to cheat."""

import copy
import dataclasses
import functools
import mmap
import pickle
import types
import weakref

import numpy as np
import pytest
import torch

from clbench.config.compose import build, compose
from clbench.config.registry import asks, choices
from clbench.interfaces import Capabilities, Place, UserError
from clbench.streams.entries import ExperienceEntry
from clbench.streams.eval_sets import open_eval
from clbench.streams.handles import Handle, end, is_live, opened
from clbench.streams.images.data import ImageBatch, ImageData, open_experience, shuffled
from clbench.streams.scenario import ArrayImages, FileImages
from clbench.streams.tokens.class_groups import class_groups
from clbench.streams.tokens.data import TokenData, text_source
from clbench.testing import adversary, contract, data_reach
from clbench.testing import trial as trials
from clbench.testing.anytime import Idle
from clbench.testing.reach import Marks, found_in, reachable
from clbench.training import looks
from clbench.training.memory import Memory
from clbench.training.pretraining.segments import PretrainRuntime
from clbench.training.state import num_bytes
from tests.test_models import SIX, nano, plain_data

OF_IMAGES = ("cpt_lwf", "cpt_mas")  # they hold the features of an autoencoder
LOSS = [name for name in choices("learner") if asks("learner", name) == "loss"]
RNG = np.random.default_rng(0)
GONE = "is gone: a learner that needs it must declare stores_all_data or keep exemplars"


def trial(learner="ncm"):
    (config,) = compose([f"learner={learner}"])
    target = contract.load_target(config["learner"]["_target_"])
    return contract.Trial(config, contract.small_stream(), contract.declared(target, config["learner"]))


def text_trial(learner="infinite"):
    (config,) = compose(["scenario=cpt_synthetic", f"learner={learner}"])
    target = contract.load_target(config["learner"]["_target_"])
    return trials.LossTrial(config, trials.small_texts(), contract.declared(target, config["learner"]))


class MaeTrial(trials.LossTrial):
    """Groups of digits for a masked autoencoder."""

    def model(self):
        sizes = {"image": 8, "patch": 2, "width": 16, "depth": 1, "heads": 2}
        sizes |= {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}
        return build({"_target_": "clbench.models.mae.build_mae", "name": "m", **sizes})


def mae_trial(learner):
    made = text_trial(learner)
    options = {"num_classes": 6, "limit_train": 16, "limit_test": 10, "increment": 2, "epochs": 2, "batch": 8}
    return MaeTrial(made.config, class_groups(name="s", dataset="digits", **options), made.capabilities)


# --- handles


def test_a_handle_opens_until_it_ends():
    what = object()
    one, other = Handle("experience 3", what), Handle("experience 4", None)
    within = Handle("a part", [1], (one, other))
    assert opened(one) is what and opened(within) == [1] and copy.deepcopy(one) is copy.copy(one) is one
    end(other)
    assert is_live(one) and not is_live(within), "made from two, it ends with the first of them"
    with pytest.raises(UserError, match=f"data of a part {GONE}"):
        opened(within)
    with pytest.raises(UserError, match="data of an unknown experience"):
        opened(Handle.__new__(Handle))
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(one)
    assert not hasattr(one, "__weakref__") and not hasattr(one, "__dict__")


def test_what_a_handle_opens_goes_with_it():
    class Thing:
        pass

    thing = Thing()
    gone, handle = weakref.ref(thing), Handle("h", thing)
    del thing
    assert gone() is not None
    del handle
    assert gone() is None


# --- images


def digits_():
    made = trial()
    return made, made.start()[2]


@pytest.mark.parametrize("kind", list(adversary.hold(open_experience(contract.small_stream(), 1, digits_()[1]))))
def test_what_was_kept_ends_with_the_experience(kind):
    made, pipeline = digits_()
    e = open_experience(made.scenario, 0, pipeline)
    held = adversary.hold(e)[kind]
    assert np.size(adversary._everything_of(adversary.hold(e)[kind])), "readable while it runs"
    e.train.close()
    with pytest.raises(UserError, match=r"data of experience 0 \(exp0\) is gone"):
        adversary._everything_of(held)


def test_what_was_decoded_stays_and_a_subset_closes_alone():
    made, pipeline = digits_()
    train = open_experience(made.scenario, 0, pipeline).train
    batch, part = train.batch([0, 1]), train.subset([2, 3])
    x = batch.x
    part.close()
    with pytest.raises(UserError, match="is gone"):
        part.raw([0])
    assert len(train.raw([2])) == 1
    train.close()
    assert batch.x is x


def test_joined_data_reads_what_is_still_open():
    made, pipeline = digits_()
    memory = ImageData.of_arrays(list(RNG.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)), np.arange(3), np.arange(3), pipeline)
    train = open_experience(made.scenario, 0, pipeline).train
    joined = ImageData.join([memory, train])
    train.close()
    assert torch.equal(joined.batch([2, 0]).x, memory.batch([2, 0]).x)
    for rows in ([2, 3], [5]):
        with pytest.raises(UserError, match="is gone"):
            joined.batch(rows)


def test_random_parts_of_joins_are_the_images_that_they_name(tmp_path):
    """Joins of joins, subsets, cuts and selections: three sources of one size, files with arrays, one source twice."""
    from PIL import Image

    pipeline = digits_()[1]
    even = [ArrayImages(RNG.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)) for n in (5, 7, 4)]
    for i in range(6):
        Image.fromarray(RNG.integers(0, 256, (8 + i, 9, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    uneven = [even[0], FileImages([tmp_path / f"{i}.png" for i in range(6)])]
    for sources in (even, uneven, [even[0], even[0]]):
        places = [RNG.permutation(len(s))[: len(s) - 1] for s in sources]
        truth = [s.raw(np.array([i]))[0] for s, some in zip(sources, places, strict=True) for i in some]
        datas = [ImageData(s, p, p, p, pipeline, None, "d") for s, p in zip(sources, places, strict=True)]
        data = ImageData.join([ImageData.join(datas[:2]), *datas[2:]])
        for _ in range(4):
            rows = RNG.integers(0, len(truth), 6)
            chosen, again = data.subset(rows), RNG.integers(0, 6, 4)
            for part in (chosen, chosen.cut()):
                for got, row in zip(part.raw(again), rows[again], strict=True):
                    assert np.array_equal(got, truth[row])
                want = torch.cat([data.batch([row]).x for row in rows[again]])
                torch.testing.assert_close(part.batch(again).x, want, atol=1e-6, rtol=0)
            again = torch.from_numpy(again)
            picked = chosen.batch(np.arange(6)).select(again)
            assert picked.stored.names() == [data.batch([int(rows[i])]).stored.names()[0] for i in again]


def test_a_selection_of_as_many_is_permuted():
    """`select` took as many rows as the batch has for all of them in order."""
    batch = ImageBatch.of(torch.arange(3.0).view(3, 1, 1, 1), torch.tensor([5, 6, 7]), torch.tensor([10, 11, 12]))
    for rows, want in (([2, 1, 0], [2, 1, 0]), ([0, 0, 2], [0, 0, 2]), ([True, False, True], [0, 2]), ([-1], [2])):
        some = batch.select(torch.tensor(rows))
        assert some.x.flatten().tolist() == want and some.ids.tolist() == [10 + i for i in want]
        assert some.y is not None and some.y.tolist() == [5 + i for i in want]
    assert batch.select(torch.arange(3)) is batch, "all of them in order are the batch itself"


def test_a_test_batch_is_decoded_until_the_next_one_is_asked_for():
    made, pipeline = digits_()
    kept = []
    for batch, _ in open_eval(made.scenario, 0, pipeline).batches(5):
        if kept:
            with pytest.raises(UserError, match="data of evaluation set"):
                assert kept[-1].x is None
        kept.append(batch)
    single = next(iter(open_eval(made.scenario, 0, pipeline).batches(5)))[0]
    assert single.x.shape[0] == 5


def test_features_are_remembered_for_issued_batches_alone():
    """A batch of bare ids got features without a pixel: of test images, and of experiences that had ended."""
    model = nano()
    model.freeze()
    data = plain_data(model)
    truth = model.features(data.batch(range(6)))
    ids = torch.arange(50, 56)
    blank = torch.zeros(6, 3, 32, 32)
    for twin in (model, copy.deepcopy(model)):
        got = twin.features(ImageBatch(ids, None, None, lambda: blank, True))
        assert torch.equal(got, twin.features(blank)) and not torch.isclose(got, truth).all(1).any()
    said = data.batch([0] * 6)
    said.ids = ids
    assert torch.equal(model.features(said), truth[[0] * 6]), "what was issued counts, not what it says"
    zeros = ArrayImages(np.zeros((6, 8, 8, 3), np.uint8))
    other = ImageData(zeros, np.arange(6), ids.numpy(), np.arange(6), data.pipeline, None, "other")
    assert not torch.isclose(model.features(other.batch(range(6))), truth).all(1).any(), "the same ids of another source"
    kept, before = data.batch([1, 2]), dict(model.passes)
    assert torch.equal(model.features(data.batch([1, 2])), truth[1:3]) and model.passes == before
    data.close()
    with pytest.raises(UserError, match="is gone"):
        model.features(kept)
    assert torch.equal(model.features(plain_data(model).batch(range(6))), truth) and model.passes == before


def test_a_store_is_asked_for_its_own_images_only(tmp_path):
    from tests.test_feature_store import store_at

    model = nano()
    model.freeze()
    model.memory.attach(store_at(tmp_path), SIX)
    truth = model.features(plain_data(model).batch(range(6)))
    model.memory.flush()
    later = nano()
    later.freeze()
    later.memory.attach(store_at(tmp_path), SIX)
    other = ArrayImages(np.array(SIX.array[::-1]))
    data = ImageData(other, np.arange(6), np.arange(6) + 50, np.arange(6), plain_data(later).pipeline, None, "other")
    later.features(data.batch(range(6)))
    assert later.passes["stored"] == 0, "ids of another source are not those of the store"
    assert torch.equal(later.features(plain_data(later).batch(range(6))), truth) and later.passes["stored"] == 6
    paths = [path for path, found in reachable({"model": later}) if isinstance(found, type(tmp_path))]
    assert paths == [], "the model does not lead to the store's folder"


# --- texts


def part_of(name, tokens, context, first, size):
    entry = ExperienceEntry(name, first=first, sequences=size, steps=5)
    return TokenData.of(entry, text_source(tokens, context), context, 2, key=3)


def text(size=10, first=4, whole=40, context=4):
    tokens = np.arange(whole * context + 1, dtype=np.uint16)
    return tokens, part_of("e", tokens, context, first, size)


def test_a_text_gives_its_own_sequences_and_no_other():
    tokens, data = text()
    own = {int(row[0]) for row in data.read(np.arange(10))}
    assert len(own) == 10 and {int(row[0]) for row in data.read(np.arange(200))} == own
    others = [part_of("o", tokens, 4, first, size) for first, size in ((0, 4), (14, 26))]
    starts = [{int(row[0]) for row in other.read(np.arange(len(other)))} for other in others]
    assert set().union(own, *starts) == {4 * i for i in range(40)} and not own & (starts[0] | starts[1])
    for numbers in ([10], [-1], [0, 3, 39]):
        with pytest.raises(UserError, match=r"experience e has the sequences 0..9, asked for"):
            data.take(np.array(numbers), "new", np.array(numbers))
    with pytest.raises(UserError, match="has the sequences"):
        data.read(np.arange(40), size=40)
    for change in ({"first": 0}, {"key": 9}, {"context": 2}):
        assert {int(row[0]) for row in dataclasses.replace(data, **change).read(np.arange(10))} == own
    other = copy.deepcopy(data)
    data.close()
    for closed in (data, other, dataclasses.replace(data, first=0)):
        with pytest.raises(UserError, match="data of experience e is gone"):
            closed.read(np.arange(3))


def test_looks_are_asked_of_the_observer_that_is_set():
    class Noting:
        def __init__(self, name):
            self.name, self.noted = name, []

        def at_step(self, name, place, lr, visits):
            self.noted.append((name, place.step, lr, visits))
            return 2.0

        def trunk_ended(self, model):
            self.noted.append("trunk")

        def state_dict(self):
            return {"noted": list(self.noted)}

        def load_state_dict(self, state):
            self.noted = state["noted"]

    place = Place(0, 1, 2, 1)
    assert looks.at_step("s", place, 0.1, 4) == 0.0 and looks.state_dict() is None
    looks.trunk_ended(None)  # type: ignore[arg-type]
    looks.load_state_dict(None)
    outer, inner = Noting("outer"), Noting("inner")
    with looks.observed_by(outer):
        with looks.observed_by(inner):
            assert looks.at_step("s", place, 0.1, 4) == 2.0
        looks.trunk_ended(None)  # type: ignore[arg-type]
        assert looks.state_dict() == {"noted": ["trunk"]}
        looks.load_state_dict({"noted": [3]})
    assert inner.noted == [("s", 1, 0.1, 4)] and outer.noted == [3] and looks.state_dict() is None
    assert not hasattr(PretrainRuntime(seed=0, device=torch.device("cpu")), "observer")


# --- what the walk finds

FOREIGN = RNG.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
OWN = RNG.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
POOL = np.concatenate([OWN, FOREIGN])


class Slots:
    __slots__ = ("inside",)


class Plain:
    pass


class Shared:
    pool = None


def slotted(x):
    made = Slots()
    made.inside = x
    return made


def attribute(x):
    made = Plain()
    made.deep = [{"k": (x,)}]
    return made


def started(x):
    def steps():
        hidden = x
        yield 1
        yield hidden

    made = steps()
    next(made)
    return made


def mapped(x):
    hidden = mmap.mmap(-1, x.nbytes)
    hidden.write(x.tobytes())
    return hidden


def referred(x):
    made = Plain()
    made.x = x
    return [made, weakref.ref(made)][1:], made


def hooked(x):
    made = torch.nn.Linear(1, 1)
    made.register_forward_hook(lambda *given: x)
    return made


LEAKS = {
    "attribute": attribute,
    "slot": slotted,
    "dictionary key": lambda x: {x.tobytes(): 1},
    "closure": lambda x: lambda: x,
    "default": lambda x: eval("lambda v=x: v", {"x": x}),
    "partial": lambda x: functools.partial(np.sum, x),
    "bound method": lambda x: attribute(x).__eq__,
    "method of an array": lambda x: x.sum,
    "base of a view": lambda x: POOL[:2],
    "base of a reshaped view": lambda x: POOL[:1].reshape(-1),
    "storage of a tensor": lambda x: torch.from_numpy(POOL)[:2],
    "generator": started,
    "iterator": lambda x: iter([x]),
    "map": lambda x: map(np.sum, [x]),
    "zip": lambda x: zip([1], [x], strict=True),
    "bytes": lambda x: x.tobytes(),
    "mapped file": mapped,
    "memory view": lambda x: memoryview(x.tobytes())[:3],
    "weak reference": referred,
    "named tuple": lambda x: types.SimpleNamespace(a=x),
    "list of numbers": lambda x: x.reshape(-1).tolist(),
    "other type": lambda x: x.astype(np.int64)[1:3],
    "tensor of numbers": lambda x: torch.from_numpy(x.astype(np.int32)),
    "gradient": lambda x: torch.zeros(3, requires_grad=True),
    "object array": lambda x: np.array([x, None], dtype=object),
    "structured array": lambda x: np.array([(7, x[2].reshape(-1))], dtype=[("id", "<i8"), ("x", "u1", (192,))]),
    "module": lambda x: torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.from_numpy(x.copy()), requires_grad=False)}),
    "hook": hooked,
}


@pytest.mark.parametrize("kind", LEAKS)
def test_the_walk_finds(kind):
    marks = Marks({f"foreign {i}": image for i, image in enumerate(FOREIGN)}, [OWN])
    assert len(marks) == 4 and found_in({"own": [OWN, OWN.tobytes(), torch.from_numpy(OWN.copy())]}, marks) is None
    made = LEAKS[kind](FOREIGN)
    if kind == "gradient":
        values = RNG.normal(size=40).astype(np.float32)
        marks, made = Marks({"foreign 0": values}), torch.zeros(40, requires_grad=True)
        made.grad = torch.from_numpy(values)
    found = found_in({"root": made}, marks)
    assert found is not None and found.startswith("root") and "foreign" in found


def test_a_view_of_a_parameter_that_has_changed_is_walked_through():
    """Made under no_grad, it cannot say whether it is a leaf."""
    weights = torch.nn.Parameter(torch.from_numpy(np.asarray(FOREIGN[0], np.float32)).clone())
    with torch.no_grad():
        view = weights[...]
        weights.mul_(1)
    assert "_base" in {path.split(".")[-1] for path, _ in reachable({"root": [view]})}


def test_the_walk_finds_what_stands_in_a_class(monkeypatch):
    monkeypatch.setattr(Shared, "pool", FOREIGN)
    assert "<class Shared>" in (found_in({"root": Shared()}, Marks({"f": FOREIGN[0]})) or "")


def test_the_walk_does_not_open_handles_and_ends_in_circles():
    made = Plain()
    made.self, made.handle = made, Handle("h", FOREIGN)
    assert found_in({"root": made}, Marks({"f": FOREIGN[0]})) is None


def test_marks_are_found_at_any_place_and_not_elsewhere():
    marks = Marks({str(i): RNG.normal(size=20).astype(np.float32) for i in range(50)})
    noise = RNG.normal(size=100_000).astype(np.float32)
    assert marks.find(noise) is None
    for width in (np.float32, np.float64):
        value = RNG.normal(size=20).astype(np.float32)
        marks, at = Marks({"it": value}), int(RNG.integers(0, 99_000))
        noise[at : at + 20] = value
        assert marks.find(noise.astype(width)) == "it"
        noise[at + 10] += 1
    assert len(Marks({"flat": np.zeros(50, np.uint8), "short": np.arange(5)})) == 0


# --- the checks of the contract find planted leaks


def failing(check, subject):
    with pytest.raises(AssertionError, match="can be reached at"):
        check(subject)


@pytest.mark.parametrize("kind", ["source", "pipeline", "labels"])
def test_the_check_finds_data_that_leads_elsewhere(kind, monkeypatch):
    def leaking(scenario, index, pipeline, *exempt):
        e = open_experience(scenario, index, pipeline, *exempt)
        x = scenario.dataset.images
        what = {"source": x, "pipeline": torch.from_numpy(np.array(x.array)), "labels": scenario.dataset.y}[kind]
        (e.train.pipeline if kind == "pipeline" else e.train).leak = what
        return e

    monkeypatch.setattr(trials, "open_experience", leaking)  # inside learn
    failing(data_reach.check_only_own_data_is_reachable, trial())
    monkeypatch.undo()
    monkeypatch.setattr(data_reach, "open_experience", leaking)  # before it
    failing(data_reach.check_only_own_data_is_reachable, trial())


def test_the_check_finds_features_and_images_that_a_model_or_learner_keeps(monkeypatch):
    from clbench.learners.ncm import NearestClassMean as NCM

    learn, predict = NCM.learn, NCM.predict

    def keeping(self, experience):
        self.kept = experience.train.batch([0, 1]).x
        return learn(self, experience)

    monkeypatch.setattr(NCM, "learn", keeping)
    failing(data_reach.check_only_own_data_is_reachable, trial())

    def showing(self, batch):
        self.model.rows = opened(self.model.memory._table).rows
        return predict(self, batch)

    monkeypatch.undo()
    monkeypatch.setattr(NCM, "predict", showing)
    failing(data_reach.check_only_own_data_is_reachable, trial())


def test_the_adversary_finds_a_way_that_works(monkeypatch):
    monkeypatch.setattr(ImageData, "close", lambda self: None)
    with pytest.raises(AssertionError, match="after the experience"):
        data_reach.check_adversary(trial())
    monkeypatch.undo()
    monkeypatch.setattr(TokenData, "close", lambda self: None)
    with pytest.raises(AssertionError, match="after the experience"):
        data_reach.check_text_adversary(text_trial())


@pytest.mark.parametrize("kind", ["observer", "tokens"])
def test_the_check_finds_a_runtime_or_a_text_that_leads_elsewhere(kind):
    made = text_trial()

    class Leaking(trials.LossTrial):
        def start(self, folder=None, **changes):
            made = super().start(folder, **changes)
            if kind == "observer":
                made[1].observer = Idle([self.scenario.evaluation(0)])
            return made

        def open(self, index, pipeline):
            e = super().open(index, pipeline)
            if kind == "tokens":
                vars(e.train)["tokens"] = self.scenario.domains[2].train
            return e

    failing(data_reach.check_only_own_text_is_reachable, Leaking(made.config, made.scenario, made.capabilities))


@pytest.mark.parametrize("kind", [text_trial, mae_trial])
@pytest.mark.parametrize("name", LOSS)
def test_own_learners_of_texts_and_of_masked_images(name, kind):
    if kind is mae_trial and text_trial(name).capabilities.writes_text:
        with pytest.raises(UserError, match="text is written by a model that has `sample`"):
            kind(name).start()
        return
    if kind is text_trial and name in OF_IMAGES:
        with pytest.raises(UserError, match="autoencoder"):
            kind(name).start()
        return
    made = kind(name)
    data_reach.check_only_own_text_is_reachable(made)
    data_reach.check_text_adversary(made)


# --- costs


def test_a_state_is_weighed_in_whatever_it_is_held():
    array, tensor = np.zeros((3, 5), np.float32), torch.zeros(7, dtype=torch.int16)
    assert num_bytes({"a": array, "again": [array, tensor, tensor]}) == 60 + 14
    assert num_bytes([1, 2.5, True, None]) == 3 * 8 and num_bytes({"n": 3}) == 8
    assert num_bytes({"b": b"12345", "c": bytearray(3), "s": "né"}) == 5 + 3 + 3
    assert num_bytes({4: torch.zeros(2), (1, 2): None}) == 8 + 8 + 16
    assert num_bytes({"o": np.array([np.zeros(4), 7], dtype=object)}) == 32 + 8
    assert num_bytes({}) == num_bytes([]) == num_bytes(None) == 0


def test_a_memory_reads_no_more_than_it_keeps():
    class Counting(ArrayImages):
        reads = 0

        def raw(self, ids):
            Counting.reads += len(ids)
            return super().raw(ids)

    source = Counting(RNG.integers(0, 256, (50, 8, 8, 3), dtype=np.uint8))
    data = ImageData(source, np.arange(50), np.arange(50), np.arange(50) % 5, digits_()[1], None, "d")
    memory = Memory("balanced", None, 4 * 192 + 7, seed=0)
    memory.update(data)
    assert len(memory) == 4 and Counting.reads == 5 and memory.num_bytes() == 4 * 192
    assert all(np.array_equal(image, source.array[i]) for image, i in zip(memory.images, memory.ids, strict=True))


def test_capabilities_that_store_are_allowed_their_past():
    assert Capabilities(stores_all_data=True).stores_all_data
    for name in ("joint", "replay"):
        data_reach.check_only_own_data_is_reachable(trial(name))
    assert len(shuffled(open_experience(contract.small_stream(), 0, digits_()[1]).train, 4, 1, 0)(0)) == 4
