"""Small networks for tests of learners: multilayer perceptrons and convolutional networks behind the interface of a model."""

import itertools

import torch
from torch import nn

from clbench.interfaces import Capabilities
from clbench.models.backbone import Backbone
from clbench.streams.eval_sets import open_eval
from clbench.streams.images.data import ImageBatch
from clbench.streams.images.pixels import Profile
from clbench.testing.contract import Trial, small_stream
from clbench.training.checkpoint import Journal
from clbench.training.runtime import Runtime

SIDE = 8


class Net(nn.Sequential):
    """Layers one after another; the last one's activations are the features."""

    def __init__(self, *layers, num_features):
        super().__init__(*layers)
        self.num_features = num_features

    def forward_features(self, x):
        return self(x)

    def forward_head(self, x, pre_logits=True):
        return x


def mlp(*widths, bias=True):
    """Linear and ReLU in turn on 8 x 8 images."""
    sizes, layers = [3 * SIDE * SIDE, *widths], [nn.Flatten()]
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b, bias=bias), nn.ReLU()]
    return Net(*layers, num_features=widths[-1])


def convnet(norm=True):
    """Convolution (with BatchNorm), pooling, convolution, flattening, Linear."""
    layers = [nn.Conv2d(3, 6, 3, padding=1), *([nn.BatchNorm2d(6)] if norm else []), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(20, 12), nn.ReLU()]
    return Net(*layers, num_features=12)


def backbone(net, seed=0):
    """A network as a model, with weights from a seed."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for module in net.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    profile = Profile("test", SIDE, (0.5,) * 3, (0.5,) * 3, resize=SIDE, train="test", flip=False)
    return Backbone(net, profile, {"name": "small"}, pretrained=False)


class SmallTrial(Trial):
    """A learner class with options on a small network and a stream of six digits in pairs."""

    def __init__(self, make, learner, kind="class_incremental", scenario=None, can=None, **options):
        self.make, self.learner, self.options = make, learner, options
        super().__init__({}, scenario or small_stream(kind, sizes=[2, 2, 2]), can or Capabilities())

    def start(self, folder=None, **changes):
        from clbench.streams.images.pixels import Pipeline

        model = backbone(self.make())
        runtime = Runtime(self.seed, torch.device("cpu"), self.scenario.budget)
        runtime.journal = Journal(folder, 0.0)
        return self.learner(model, runtime, **self.options), runtime, Pipeline(model.profile, torch.device("cpu"), "none")

    def begin(self):
        """A fresh learner, and a function that lets it learn experience i."""
        learner, runtime, pipeline = self.start()
        return learner, lambda i: self.learn(learner, runtime, pipeline, i), pipeline

    def answers_of(self, learner, pipeline, j, size=6):
        """Scores on evaluation set j."""
        with torch.no_grad():
            return torch.cat([learner.predict(batch) for batch, _ in open_eval(self.scenario, j, pipeline).batches(size)])


def images(number, seed=0, y=None):
    """Random images as a batch."""
    x = torch.randn(number, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return ImageBatch.of(x, None if y is None else torch.as_tensor(y))
