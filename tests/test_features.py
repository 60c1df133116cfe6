"""Last features of any classifier, wrapped or not, with their gradient."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, relu

from eekd import models
from eekd.snapshots.features import LastFeatures


class Net(nn.Module):
    """Defines its classifier before its body, and has a trap for whoever takes the last module."""

    def __init__(self, early=False, wrap=None):
        super().__init__()
        head, body = nn.Linear(8, 3), nn.Linear(5, 8)
        if early:
            self.head, self.body = head, body
        else:
            self.body, self.head = body, head
        self.last = nn.Dropout(0.0)
        self.wrap = wrap

    def forward(self, x):
        logits = self.last(self.head(relu(self.body(x))))
        return self.wrap(logits) if self.wrap else logits


def expected(net, x):
    features = relu(net.body(x))
    return net.head(features), features


@pytest.fixture
def net(device):
    torch.manual_seed(0)
    return Net().to(device)


@pytest.fixture
def x(device):
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).to(device)


def check(capture, net, x):
    """Values and the gradients that reach the body, through either output."""
    for weigh in ((1, 0), (0, 1), (1, 2)):
        grads = []
        for logits, features in (capture(x), expected(net, x)):
            loss = weigh[0] * logits.square().sum() + weigh[1] * features.square().sum()
            grads.append(torch.autograd.grad(loss, list(net.body.parameters())))
        torch.testing.assert_close(grads[0], grads[1])
    torch.testing.assert_close(capture(x), expected(net, x))


@pytest.mark.parametrize("layer", [None, "head"])
def test_gives_logits_and_last_features_with_gradients(net, x, layer):
    capture = LastFeatures(net, layer)
    assert capture.dim == 8
    check(capture, net, x)


def test_a_named_layer_may_be_any_linear_one(net, x):
    capture = LastFeatures(net, "body")
    assert capture.dim == 5
    assert torch.equal(capture(x)[1], x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_of_the_model_is_independent(net, x, copied):
    LastFeatures(torch.compile(net, backend="eager"))
    capture = LastFeatures(net)
    net(x)  # leaves features with their graph, which cannot be copied, in the hook
    twin = copied(net)
    with torch.no_grad():
        twin.body.weight.zero_()
    check(capture, net, x)
    check(LastFeatures(twin), twin, x)


def test_leaves_the_state_and_nothing_alive(net, x):
    before = list(net.state_dict())
    capture = LastFeatures(net)
    capture(x)
    assert list(net.state_dict()) == before
    assert capture._tap.input is None


@pytest.mark.parametrize("layer", [None, "head"])
def test_through_torch_compile(net, x, layer):
    capture = LastFeatures(torch.compile(net, backend="aot_eager", fullgraph=True), layer)
    check(capture, net, x)
    check(capture, net, x + 1)


def test_inside_a_compiled_step(net, x):
    capture = LastFeatures(net)
    compiled = torch.compile(lambda x: capture(x), backend="aot_eager", fullgraph=True)
    check(compiled, net, x)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("compiled", [False, True])
def test_through_distributed_data_parallel(net, x, process_group, compiled):
    ddp = nn.parallel.DistributedDataParallel(net)
    model = torch.compile(ddp, backend="aot_eager") if compiled else ddp
    logits, features = LastFeatures(model, "head")(x)
    (logits.square().sum() + features.sum()).backward()
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    logits, features = expected(net, x)
    (logits.square().sum() + features.sum()).backward()
    torch.testing.assert_close(grads, [p.grad for p in net.parameters()])


def test_an_output_object_with_logits(x, device):
    net = Net(wrap=lambda logits: SimpleNamespace(logits=logits, loss=None)).to(device)
    check(LastFeatures(net), net, x)


def test_a_convolution_as_the_classifier(device):
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 3, 1), nn.Flatten()).to(device)
    images = torch.randn(2, 6, 4, 4, device=device)
    logits, features = LastFeatures(net, "1")(images)
    torch.testing.assert_close(features, images.mean((2, 3)))
    assert logits.shape == (2, 3)


@pytest.mark.parametrize("name", models.names())
def test_every_named_model(name):
    with torch.device("meta"):
        model = models.build(name, num_classes=10)
        logits, features = (capture := LastFeatures(model))(torch.empty(2, 3, 32, 32))
    assert logits.shape == (2, 10) and features.shape == (2, capture.dim)
    assert capture.layer == ("4" if name == "mlp64" else "classifier")


@pytest.mark.full
@pytest.mark.parametrize("name, size", [("resnet18", 32), ("vit_tiny_patch16_224", 32)])
def test_timm_models(name, size):
    pytest.importorskip("timm")
    with torch.device("meta"):
        model = models.build(f"timm:{name}", num_classes=10, image_size=size)
        logits, features = (capture := LastFeatures(model))(torch.empty(2, 3, size, size))
    assert logits.shape == (2, 10) and features.shape == (2, capture.dim)


@pytest.mark.bad_input
@pytest.mark.parametrize("model", [None, "resnet8", lambda x: x])
def test_a_model_must_be_a_module(model):
    with pytest.raises(TypeError, match="model must be an nn.Module, got"):
        LastFeatures(model)


@pytest.mark.bad_input
@pytest.mark.parametrize("model", [nn.Identity(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())])
def test_a_model_without_linear_layer_is_refused(model):
    with pytest.raises(ValueError, match="model must have an nn.Linear or a 1×1 convolution, got a .*; name its"):
        LastFeatures(model)


@pytest.mark.bad_input
@pytest.mark.parametrize("layer, nearest", [("haed", "head"), ("Body", "body"), ("fc", ""), (3, "")])
def test_an_unknown_layer_is_answered_with_the_nearest(net, layer, nearest):
    with pytest.raises(ValueError, match=f"got {layer!r}; did you mean '{nearest}"):
        LastFeatures(net, layer)


def test_a_layer_without_matrix_says_its_width_after_a_call(net, x):
    capture = LastFeatures(net, "last")
    with pytest.raises(
        RuntimeError, match="^the width of the features is not known: call this once, for 'last' has none"
    ):
        _ = capture.dim
    logits, features = capture(x)
    assert torch.equal(logits, features) and capture.dim == 3


@pytest.mark.bad_input
def test_a_last_linear_that_does_not_give_the_logits_is_refused(x, device):
    with pytest.raises(ValueError, match="the last nn.Linear, 'body', must give the 3 logits, got 8 values"):
        LastFeatures(Net(early=True).to(device))(x)


@pytest.mark.bad_input
def test_a_layer_that_does_not_run_is_named(net, x):
    net.forward = lambda x: linear(relu(net.body(x)), net.head.weight)
    with pytest.raises(RuntimeError, match="'head' must run once in the model's forward, got none"):
        LastFeatures(net)(x)


@pytest.mark.bad_input
def test_a_compiled_model_that_already_ran_is_refused(net, x):
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    with pytest.raises(RuntimeError, match="before a compiled model first runs"):
        LastFeatures(compiled)(x)


@pytest.mark.bad_input
def test_one_feature_for_each_sample(device):
    with pytest.raises(ValueError, match="must have 5 inputs a sample, got 20"):
        LastFeatures(nn.Linear(5, 3).to(device))(torch.randn(2, 4, 5, device=device))


class Chooser(nn.Module):
    """Logits of every position, of which the model takes one for each sample, or the mean."""

    def __init__(self, mean=False):
        super().__init__()
        self.body, self.head, self.mean = nn.Linear(5, 8), nn.Linear(8, 3), mean

    def forward(self, x, last):
        each = self.head(relu(self.body(x)))
        return each.mean(1) if self.mean else each[torch.arange(len(x), device=x.device), last]


def test_features_are_those_of_the_position_that_the_model_chooses(device):
    torch.manual_seed(0)
    net, x, last = Chooser().to(device), torch.randn(4, 6, 5, device=device), torch.tensor([5, 0, 3, 3], device=device)
    capture = LastFeatures(net)
    for where in (last, last.flip(0)):
        logits, features = capture(x, where)
        want = relu(net.body(x))[torch.arange(4), where]
        torch.testing.assert_close((logits, features), (net(x, where), want))
        grads = [torch.autograd.grad(u.square().sum(), net.body.weight)[0] for u in (features, want)]
        torch.testing.assert_close(*grads)


@pytest.mark.bad_input
def test_logits_of_no_one_position_are_refused(device):
    net, x = Chooser(mean=True).to(device), torch.randn(4, 6, 5, device=device)
    with pytest.raises(ValueError, match="must be those of one position of the input of 'head', .4, 6, 8., got others"):
        LastFeatures(net)(x, None)
