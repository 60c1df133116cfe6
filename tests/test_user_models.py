"""Models that others wrote: their outputs, inputs, classifiers and wrappers work, or are refused in one sentence."""

import copy
import gc
import pickle
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from eekd import Distilled, EEKDLoss, LastFeatures, SnapshotEnsemble
from eekd.snapshots.wrappers import bare_model, logits_of
from eekd.train import __main__ as cli

Output = namedtuple("Output", "logits aux_logits")


class Net(nn.Module):
    """Features of width 5, three classes, and an output of any kind."""

    def __init__(self, output=lambda logits: logits):
        super().__init__()
        self.body, self.head, self.output = nn.Linear(4, 5), nn.Linear(5, 3), output

    def forward(self, x):
        return self.output(self.head(self.body(x).relu()))


def rows(b=6):
    return torch.randn(b, 4, generator=torch.Generator().manual_seed(1))


def same(outputs, net, x):
    features = net.body(x).relu()
    torch.testing.assert_close(outputs, (net.head(features), features))


# outputs and inputs


@pytest.mark.parametrize(
    "output",
    [
        lambda z: SimpleNamespace(logits=z, loss=None),
        lambda z: Output(z, None),
        lambda z: (z, z.sum(1)),
        lambda z: [z],
        lambda z: (z.mean(), z),  # a loss before the logits
        lambda z: {"logits": z, "hidden": z + 1},
        lambda z: {"out": z},
    ],
)
def test_logits_are_found_in_any_output(output):
    net = Net(output)
    same(LastFeatures(net)(rows()), net, rows())
    logits, features = SnapshotEnsemble([net, net])(rows())
    same((logits[1], features[1]), net, rows())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda z: {"out": z, "aux": z}, "a dict of out, aux"),
        (lambda z: (z.mean(),), "a tuple of Tensor"),
        (lambda z: (), "a tuple of nothing"),
        (lambda z: {}, "a dict of nothing"),
        (lambda z: None, "a NoneType"),
        (lambda z: SimpleNamespace(scores=z), "a SimpleNamespace"),
    ],
)
def test_outputs_without_logits_are_refused(output, got):
    with pytest.raises(ValueError, match=f"^the model must return logits, alone, as .logits, .* or first, got {got}$"):
        LastFeatures(Net(output))(rows())


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, tokens, mask=None, *, scale=1.0):
        return self.head(input=self.body(tokens).relu() * mask * scale)


def test_several_inputs_and_keywords():
    net, x, mask = Two(), rows(), torch.ones(6, 1)
    capture, ensemble = LastFeatures(net), SnapshotEnsemble([net, net], snapshots_on="cpu")
    for inputs, named in (((x, mask), {}), ((x,), {"mask": mask}), ((), {"tokens": x, "mask": mask, "scale": 1.0})):
        same(capture(*inputs, **named), net, x)
        logits, features = ensemble(*inputs, **named)
        same((logits[0], features[0]), net, x)
    same(capture(x, mask=2 * mask, scale=0.5), net, x)


# memory


def test_two_calls_give_two_tensors():
    ensemble = SnapshotEnsemble([Net(), Net()])
    kept = [ensemble(x)[0] for x in rows().split(2)]
    torch.testing.assert_close(torch.cat(kept, 1), ensemble(rows())[0])
    reused = SnapshotEnsemble([Net()], reuse=True)
    assert reused(rows())[0].data_ptr() == reused(rows())[0].data_ptr()


# classifiers


class Squeeze(nn.Module):
    """A classifier that is a convolution before the pooling, as SqueezeNet's."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(1, 5, 3)
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(5, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x):
        return self.classifier(self.body(x).relu())


def test_a_classifier_that_is_a_convolution():
    net, x = Squeeze().eval(), torch.randn(4, 1, 8, 8)
    capture = LastFeatures(net)
    logits, features = capture(x)
    assert (capture.layer, capture.dim) == ("classifier.1", 5)
    torch.testing.assert_close(features, net.body(x).relu().mean((2, 3)))
    torch.testing.assert_close(
        nn.functional.linear(features, net.classifier[1].weight.flatten(1), net.classifier[1].bias), logits
    )
    many = SnapshotEnsemble([net, net])(x)
    torch.testing.assert_close((many[0][0], many[1][1]), (logits, features))
    with pytest.raises(ValueError, match="the last 1×1 convolution, '1', must give the 3 logits, got 6 values"):
        LastFeatures(nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.Conv2d(4, 6, 1), nn.Flatten(), nn.MaxPool1d(2)))(
            rows()
        )


class Cosine(nn.Module):
    """A normed head, (D, C)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))

    def forward(self, x):
        return nn.functional.normalize(x, dim=1) @ nn.functional.normalize(self.weight, dim=0)


def test_a_head_of_ones_own_is_named():
    net = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), Cosine())
    net[0] = nn.Linear(4, 5)
    with pytest.raises(ValueError, match="the last nn.Linear, '0', must give the 3 logits, got 5 values; name"):
        LastFeatures(net)(rows())
    capture = LastFeatures(net, "2")
    _, features = capture(rows())
    assert capture.dim == 5
    torch.testing.assert_close(features, net[1](net[0](rows())))
    ensemble = SnapshotEnsemble([net], layer="2")
    ensemble(rows())
    assert ensemble.feature_dim == 5


def test_features_are_asked_for_only_where_they_are_needed():
    net = nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten())
    x = torch.randn(4, 1, 8, 8)
    with pytest.raises(ValueError, match="model must have an nn.Linear or a 1×1 convolution"):
        LastFeatures(net)
    assert LastFeatures(net, features=False)(x)[1] is None
    ensemble = SnapshotEnsemble([net, net], features=False)
    logits, features = ensemble(x)
    assert features is None
    torch.testing.assert_close(logits[1], net(x))
    loss, _ = EEKDLoss("entropy")(net(x), logits, torch.tensor([0, 1, 2, 0]))
    loss.backward()
    with pytest.raises(RuntimeError, match="^the width of the features is not known: features=False asks for none$"):
        _ = ensemble.feature_dim


class Twice(Net):
    def forward(self, x):
        return self.head(self.body(x).relu()) + self.head(self.body(-x).relu())


@pytest.mark.bad_input
def test_a_head_that_runs_more_than_once():
    with pytest.raises(RuntimeError, match="^'head' must run once in the model's forward, got more; name another"):
        LastFeatures(Twice())(rows())
    with pytest.raises(RuntimeError, match="must run once"):
        SnapshotEnsemble([Twice()])(rows())
    net = Net()
    capture = LastFeatures(net)
    net(rows())  # calls without the capture do not count
    net(rows())
    same(capture(rows()), net, rows())


# wrappers


def script(net):
    return torch.jit.script(net)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(ValueError, match="^model must be written in Python for its features, got a RecursiveScriptMod"):
        LastFeatures(script(net))
    logits, _ = SnapshotEnsemble([script(net), script(net)], features=False)(rows())
    torch.testing.assert_close(logits[1], net(rows()).detach())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
def test_the_old_norms_of_weights_are_copied(norm):
    net = nn.Sequential(norm(nn.Linear(4, 5)), nn.ReLU(), norm(nn.Linear(5, 3)))
    net(rows()).sum().backward()  # leaves a weight with its graph
    weight = net[0].weight
    ensemble = SnapshotEnsemble([net])
    assert net[0].weight is weight
    torch.testing.assert_close(ensemble(rows())[0][0], net.eval()(rows()).detach())


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        lambda net: torch.compile(net, backend="eager"),
        lambda net: torch.compile(nn.DataParallel(net), backend="eager"),
    ],
)
def test_wrapped_models(wrap):
    net = Net()
    wrapped = wrap(net)
    ensemble = SnapshotEnsemble([wrapped])
    assert type(ensemble.models[0]) is Net and isinstance(bare_model(wrapped), Net)
    logits, features = ensemble(rows())
    same((logits[0], features[0]), net, rows())
    same(LastFeatures(wrapped)(rows()), bare_model(wrapped), rows())


# removing


def test_a_model_is_as_it_was_when_the_features_are_removed():
    net = Net()
    before = pickle.dumps(net.state_dict()), dict(vars(net.head))
    with LastFeatures(net) as capture:
        capture(rows())
    hooks = net.head._forward_pre_hooks, net.head._forward_pre_hooks_with_kwargs
    assert not any(hooks) and vars(net.head).keys() == before[1].keys()
    with pytest.raises(RuntimeError, match="^LastFeatures was removed from its model: make another one$"):
        capture(rows())
    capture.remove()  # again is nothing
    same(LastFeatures(net)(rows()), net, rows())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_what_was_removed_is_exported_scripted_copied_and_pickled(tmp_path):
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    wanted = net(rows())
    capture = LastFeatures(net)
    capture(rows())
    capture.remove()
    for other in (
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.jit.script(net),
        torch.jit.trace(net, rows()),
        torch.export.export(net, (rows(),)).module(),
    ):
        torch.testing.assert_close(other(rows()), wanted)


def test_a_second_capture_survives_the_first():
    net = Net()
    first, second = LastFeatures(net), LastFeatures(net, "body")
    first.remove()
    torch.testing.assert_close(second(rows())[1], rows())


@pytest.mark.bad_input
@pytest.mark.parametrize("features", [True, False])
def test_a_model_whose_logits_have_no_gradient_is_noticed(features):
    net = Net(lambda z: z.detach())
    capture = LastFeatures(net, features=features)
    with pytest.raises(RuntimeError, match="^the model's logits must have a gradient in training, got none: its forw"):
        capture(rows())
    with torch.no_grad():
        capture(rows())
    net.eval()
    capture(rows())
    net.train().requires_grad_(False)  # nothing to train
    capture(rows())


@pytest.mark.bad_input
def test_probabilities_are_no_logits():
    with pytest.raises(ValueError, match="^student_logits must be logits, got probabilities, which sum to 1: leave"):
        Distilled(Net(lambda z: z.softmax(1)), SnapshotEnsemble([Net()]))(rows(), labels=torch.zeros(6).long())
    Distilled(Net(lambda z: z.log_softmax(1)), SnapshotEnsemble([Net()]))(rows(), labels=torch.zeros(6).long())


@pytest.mark.bad_input
def test_probabilities_in_a_loop_of_ones_own_are_refused_at_first():
    z, snapshots, labels = torch.randn(6, 3, requires_grad=True), torch.randn(2, 6, 3), torch.zeros(6).long()
    told = "^{} must be logits, got probabilities, which sum to 1: leave out the softmax$"
    for loss in (EEKDLoss("uniform"), EEKDLoss("last")):
        with pytest.raises(ValueError, match=told.format("student_logits")):
            loss(z.softmax(1), snapshots, labels)
        for given in (snapshots.softmax(2), list(snapshots.softmax(2))):
            with pytest.raises(ValueError, match=told.format("snapshot_logits")):
                loss(z, given, labels)
        loss(torch.eye(3)[[0, 1, 2, 0, 1, 2]], snapshots, labels)
        loss(z.softmax(1), snapshots, labels)  # a later batch is not looked at


def test_a_model_that_no_graph_can_be_made_of_runs_without_noise(capfd):
    class Margin(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x, labels=None):
            z = self.head(x.mean((2, 3)))
            return z if labels is None else z - nn.functional.one_hot(labels, 3)

    net, x = Margin(), torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(SnapshotEnsemble([net])(x)[0][0], net(x))
    assert capfd.readouterr().err == ""


# DistributedDataParallel


@pytest.fixture
def two_processes(tmp_path, monkeypatch):
    """One process that takes itself for one of two."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr("eekd.parallel.world_size", lambda: 2)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.bad_input
def test_a_forward_past_distributed_data_parallel_is_noticed(two_processes):
    net = Net()
    capture = LastFeatures(net)
    ddp = nn.parallel.DistributedDataParallel(net)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="^the model must run through its DistributedDataParallel, past which"):
            capture(rows())
    with torch.no_grad():  # to validate by
        capture(rows())
    capture(rows()) if not net.eval().training else None
    net.train()
    same(LastFeatures(ddp)(rows()), net, rows())


def test_a_capture_inside_distributed_data_parallel_is_right(two_processes):
    class Distilled(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = Net()
            self.capture = LastFeatures(self.student)

        def forward(self, x):
            return self.capture(x)

    distilled = nn.parallel.DistributedDataParallel(Distilled())
    for _ in range(2):
        same(distilled(rows()), distilled.module.student, rows())


def test_a_model_nobody_wrapped_is_not_noticed(two_processes):
    other = nn.parallel.DistributedDataParallel(Net())
    net = Net()
    for _ in range(2):
        same(LastFeatures(net)(rows()), net, rows())
    assert other.module is not net


def taught(net, **options):
    criterion = EEKDLoss(student_dim=5, snapshot_dim=5, **options)
    logits, features = LastFeatures(net)(rows())
    return criterion, (logits, logits.detach()[None], torch.zeros(6).long(), features, features.detach()[None])


@pytest.mark.bad_input
def test_attention_trained_outside_the_wrapper_of_its_student_is_noticed(two_processes):
    student = nn.parallel.DistributedDataParallel(Net())
    criterion, batch = taught(student)
    told = "^EEKDLoss must run inside DistributedDataParallel or FSDP, as its student does, for nothing averages"
    with pytest.raises(RuntimeError, match=told):
        criterion(*batch)
    with torch.no_grad():  # to validate by
        criterion(*batch)
    wrapped = nn.parallel.DistributedDataParallel(criterion)
    for _ in range(3):
        wrapped(*batch)[0].backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=told):  # past its own
        wrapped.module(*batch), wrapped.module(*batch)
    criterion.check_wrapper = False
    criterion(*batch)
    criterion, batch = taught(student, weighting="uniform")  # which has nothing to train
    criterion(*batch)


def test_attention_of_a_student_that_nobody_wrapped_is_not_noticed(two_processes):
    gc.collect()
    criterion, batch = taught(Net())
    criterion(*batch)
    other = nn.parallel.DistributedDataParallel(Net())
    criterion, batch = taught(Net())
    criterion(*batch)
    assert other.module is not None


@pytest.fixture
def sharded(two_processes):
    """A function that shards a network over this one process."""
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    return lambda net, **options: torch.distributed.fsdp.fully_shard(net, mesh=mesh, **options)


def test_attention_beside_the_shards_of_another_network_is_not_noticed(sharded):
    gc.collect()
    others, net = [sharded(Net().requires_grad_(False)), sharded(Net())], Net()
    criterion, batch = taught(net)
    criterion(*batch)
    assert net not in others


@pytest.mark.bad_input
@pytest.mark.parametrize("options", [{}, {"reshard_after_forward": True}, {"reshard_after_forward": False}])
def test_attention_outside_the_shards_of_its_student_is_noticed(sharded, options):
    gc.collect()
    criterion, batch = taught(sharded(Net(), **options))
    with pytest.raises(RuntimeError, match="^EEKDLoss must run inside DistributedDataParallel or FSDP, as its"):
        criterion(*batch)


# from the command line

FILE = """
from types import SimpleNamespace
from parts import width
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, pixels, classes):
        super().__init__()
        self.body, self.head = nn.Linear(pixels, width), nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.body(x.flatten(1)).relu())

class Dictionary(Net):
    def forward(self, x):
        return {"logits": super().forward(x), "hidden": None}

class Tuple(Net):
    def forward(self, x):
        return super().forward(x), None

class Object(Net):
    def forward(self, x):
        return SimpleNamespace(logits=super().forward(x))

def dictionary(num_classes, in_channels, image_size):
    return Dictionary(in_channels * image_size**2, num_classes)

def tuples(num_classes, in_channels, image_size):
    return Tuple(in_channels * image_size**2, num_classes)

def objects(num_classes, in_channels, image_size):
    return Object(in_channels * image_size**2, num_classes)

def headless(num_classes, in_channels, image_size):
    return nn.Sequential(nn.Conv2d(in_channels, num_classes, image_size), nn.Flatten())

class Cosine(nn.Linear):
    pass

def deep(num_classes, in_channels, image_size):
    width = in_channels * image_size**2
    return nn.Sequential(nn.Flatten(), nn.Linear(width, num_classes), nn.Dropout(0.0))
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(FILE)
    (tmp_path / "parts.py").write_text("width = 6\n")
    monkeypatch.chdir(tmp_path)
    small = "--train-limit 100 --device cpu --out run --teacher.epochs 2 --teacher.snapshots 2 --student.epochs 1"

    def run(teacher, student, *more):
        models = f"--teacher.model theirs.py:{teacher} --student.model theirs.py:{student}"
        return cli.main([*small.split(), *models.split(), *more])

    return run


def test_outputs_of_any_kind_train_from_the_command_line(command, tmp_path):
    assert command("dictionary", "tuples", "--students", "ce", "attention") == 0
    assert (tmp_path / "run" / "summary.json").is_file()


def test_students_without_features_need_no_linear_layer(command, tmp_path, capsys):
    assert command("headless", "headless", "--students", "ce", "attention") == 2
    assert "must have an nn.Linear or a 1×1 convolution" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert command("headless", "headless", "--students", "ce", "uniform", "last", "entropy") == 0


def test_the_layer_can_be_named_from_the_command_line(command, tmp_path):
    more = ["--students", "attention", "--teacher.layer", "1", "--student.layer", "head"]
    assert command("deep", "objects", *more) == 0


def test_logits_of_a_tensor_is_the_tensor():
    x = rows()
    assert logits_of(x) is x
