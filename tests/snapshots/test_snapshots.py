"""The ensemble is frozen and says what its members say, whatever the student does."""

import copy

import pytest
import torch
from recorded import Net
from torch import nn

from eekd.models import build
from eekd.snapshots import SnapshotEnsemble
from eekd.snapshots.forward import HostOffloaded

CPU = torch.device("cpu")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "models, error, message",
    [
        ([], ValueError, "models must hold at least one nn.Module"),
        (Net(), TypeError, "models must be a list of nn.Modules, got one Net"),
        (nn.Sequential(nn.Linear(1, 1)), TypeError, "models must be a list of nn.Modules, got one Sequential"),
        ([Net(), "net"], TypeError, "models must be nn.Modules, got str"),
        ([nn.Conv2d(1, 1, 3)], ValueError, "Linear"),
    ],
)
def test_ensemble_refuses(models, error, message):
    with pytest.raises(error, match=message):
        SnapshotEnsemble(models)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "other, message",
    [
        ({"classes": 4}, r"logits of snapshot 1 must have snapshot 0's shape \(2, 3\), got \(2, 4\)"),
        ({"classes": 1}, r"logits of snapshot 1 must have snapshot 0's shape \(2, 3\), got \(2, 1\)"),
        ({"width": 6}, r"features of snapshot 1 must have snapshot 0's shape \(2, 5\), got \(2, 6\)"),
    ],
)
def test_snapshots_must_agree(other, message):
    with pytest.raises(ValueError, match=message):
        SnapshotEnsemble([Net(), Net(**other)])(torch.randn(2, 1, 8, 8))


@pytest.mark.bad_input
def test_outputs_must_be_rows():
    sequence = nn.Sequential(nn.Linear(5, 3), nn.Unflatten(0, (2, 1)), nn.Softmax(-1))
    with pytest.raises(ValueError, match=r"outputs of a snapshot must be \(B, width\), got"):
        SnapshotEnsemble([sequence])(torch.randn(2, 5))


class Student(nn.Module):
    def __init__(self, teacher):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.teacher = teacher
        self.teachers = nn.ModuleList([teacher])


def test_copies_stay_frozen_whatever_the_student_does(nets, images):
    ensemble = SnapshotEnsemble(nets).to(images.device)
    student = Student(ensemble).to(images.device)
    expected = ensemble(images)[0].clone()
    student.train().requires_grad_(True)
    student.apply(lambda module: module.train())
    ensemble.train()
    assert not ensemble.training
    for model in ensemble.models:
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    logits, features = ensemble(images)
    assert torch.equal(logits, expected) and not logits.requires_grad and not features.requires_grad
    assert all(model.norm.num_batches_tracked == 1 for model in ensemble.models)


def test_a_student_does_not_carry_its_teacher(nets):
    student = Student(SnapshotEnsemble(nets))
    names = ["body.weight", "body.bias"]
    assert list(student.state_dict()) == names == [name for name, _ in student.named_parameters()]
    assert not list(student.teacher.parameters()) and not list(student.teacher.buffers())
    student.load_state_dict(nn.ModuleDict({"body": nn.Linear(3, 3)}).state_dict())


def test_given_models_stay_as_they_are(nets, images):
    ensemble = SnapshotEnsemble(nets).to(images.device)
    before = ensemble(images)[0].clone()
    assert all(net.training and net.head.weight.requires_grad for net in nets)
    nn.init.zeros_(nets[0].head.weight)
    assert torch.equal(ensemble(images)[0], before)


def test_what_moves_the_student_moves_the_copies(nets, images):
    student = Student(SnapshotEnsemble(nets))
    student.to(images.device, torch.float64).to(memory_format=torch.channels_last)
    logits, features = student.teacher(images.double().to(memory_format=torch.channels_last))
    assert logits.device == images.device and logits.dtype == features.dtype == torch.float64
    for m, net in enumerate(nets):
        assert student.teacher.models[m].convolution.weight.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(logits[m], net.to(images.device).double().eval()(images.double()))


def test_a_copied_ensemble_is_whole_and_separate(nets, images):
    ensemble = SnapshotEnsemble(nets).to(images.device)
    logits, _ = ensemble(images)
    twin = copy.deepcopy(ensemble)
    nn.init.zeros_(ensemble.models[0].head.weight)
    expected = logits.clone()
    assert torch.equal(twin(images)[0], expected) and twin.feature_dim == 5


def test_features_are_the_input_of_the_last_linear_or_of_the_named_layer(nets, images):
    nets = [net.to(images.device).eval() for net in nets]
    logits, features = SnapshotEnsemble(nets)(images)
    for m, net in enumerate(nets):
        torch.testing.assert_close(net.head(features[m]), logits[m])
    logits, features = SnapshotEnsemble(nets, layer="hidden")(images)
    assert features.shape == (3, 4, 4)
    torch.testing.assert_close(nets[2].head(nets[2].hidden(features[2])), logits[2])


def test_memory_is_used_again_sliced_and_grown_on_request(nets, images):
    ensemble = SnapshotEnsemble(nets, reuse=True).to(images.device)
    first = ensemble(images)
    pointers = [output.data_ptr() for output in first]
    smaller = ensemble(images[:2])
    assert [output.data_ptr() for output in smaller] == pointers
    assert [output.shape for output in smaller] == [(3, 2, 3), (3, 2, 5)]
    assert all(output.stride(-1) == 1 for output in smaller)
    expected = [output.clone() for output in smaller]
    larger = ensemble(images.repeat(2, 1, 1, 1))
    assert larger[0].shape == (3, 8, 3) and larger[0].data_ptr() != pointers[0]
    for output, rows in zip(larger, expected, strict=True):
        torch.testing.assert_close(output[:, :2], rows)
        torch.testing.assert_close(output[:, 4:6], rows)
    assert ensemble(images)[0].data_ptr() == larger[0].data_ptr()
    assert ensemble(images[:0])[0].shape == (3, 0, 3)


def test_autocast_gives_its_dtype_and_leaving_it_gives_the_old_one(nets, images):
    ensemble = SnapshotEnsemble(nets).to(images.device)
    with torch.autocast(images.device.type, torch.bfloat16):
        low = ensemble(images)[0].clone()
    full = ensemble(images)[0]
    assert low.dtype == torch.bfloat16 and full.dtype == torch.float32
    torch.testing.assert_close(low.float(), full, atol=0.05, rtol=0.05)


def test_memory_born_in_inference_mode_serves_training(nets, images):
    ensemble = SnapshotEnsemble(nets, reuse=True).to(images.device)
    with torch.inference_mode():
        ensemble(images)
    logits, _ = ensemble(images)
    student = torch.randn(4, 3, device=images.device, requires_grad=True)
    (student * logits).sum().backward()
    torch.testing.assert_close(student.grad, logits.sum(0))


def test_a_loss_of_an_overwritten_batch_is_an_error_not_a_wrong_gradient(nets, images):
    ensemble = SnapshotEnsemble(nets, reuse=True).to(images.device)
    student = torch.randn(4, 3, device=images.device, requires_grad=True)
    loss = (student * ensemble(images)[0]).sum()
    ensemble(images)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_image_that_wants_a_gradient_gets_none_from_the_teacher(nets, images):
    outputs = SnapshotEnsemble(nets).to(images.device)(images.requires_grad_())
    assert not any(output.requires_grad for output in outputs)


def together(nets, images, **options):
    """The outputs of an ensemble and of its models one after another."""
    ensemble = SnapshotEnsemble(nets, **options).to(images.device)
    return ensemble, [output.clone() for output in ensemble(images)], alone(ensemble, images)


def alone(ensemble, images):
    outputs = zip(*(capture(images) for capture in ensemble._captures), strict=True)
    return [torch.stack(rows) for rows in outputs]


def agree(got, wanted, tolerance=1e-5):
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


def trained(name, images):
    """Two networks whose batch norms are no identities."""
    nets = [build(name, num_classes=3, in_channels=1, image_size=8) for _ in range(2)]
    for net in nets:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    nn.init.uniform_(tensor, 0.5, 1.5)
        net(images)
    return nets


@pytest.mark.parametrize("name", ["resnet8_w4", "wrn_16_1", "ShuffleNetV2"])
def test_snapshots_folded_say_what_they_say_alone(name):
    images = torch.randn(70, 1, 8, 8)
    ensemble, got, wanted = together(trained(name, images), images)
    agree(got, wanted)
    kinds = [type(module) for module in ensemble._folded._graphs[None][0].modules()]
    assert (nn.BatchNorm2d in kinds) == (name == "wrn_16_1")  # there some follow an addition
    with torch.autocast("cpu", torch.bfloat16):
        agree(ensemble(images), alone(ensemble, images), 0.05)
    ensemble.double()
    agree(ensemble(images.double()), alone(ensemble, images.double()), 1e-12)
    again = [output.clone() for output in ensemble(images.double())]
    assert all(map(torch.equal, ensemble(images.double()), again))


def write(model):
    with torch.no_grad():
        model.classifier.weight.zero_()


def replace(model):
    model.classifier.weight = nn.Parameter(torch.zeros_like(model.classifier.weight))


def exchange(model):
    model.trunk[1] = nn.Identity().eval()


def count(model):
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).running_mean.add_(3)


def hook(model):
    model.trunk.register_forward_hook(lambda module, inputs, output: output * 2)


def wake(model):
    model.train()


@pytest.mark.parametrize("change", [write, replace, exchange, count, hook, wake])
def test_a_changed_snapshot_says_something_else(change):
    images = torch.randn(8, 1, 8, 8)
    ensemble, before, _ = together(trained("resnet8_w4", images), images)
    change(ensemble.models[1])
    after = ensemble(images)
    assert torch.equal(after[0][0], before[0][0]) or change in (hook, wake)  # there all run one after another
    assert not torch.allclose(after[0][1], before[0][1])
    agree(after, alone(ensemble, images))


class Users(nn.Module):
    """A model that must run as it is: `how` says why."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        if self.how == "branch" and x.mean() > 100:
            return x
        x = self.body(x)
        if self.how == "noise":
            x = x + torch.rand_like(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("how", ["branch", "noise"])
def test_a_model_that_must_run_as_it_is_does(how):
    images = torch.randn(70, 1, 8, 8)
    nets = [Users(how), Users(how)]
    ensemble = SnapshotEnsemble(nets)
    assert ensemble._folded(ensemble._captures, images) is None
    torch.manual_seed(1)
    got = [output.clone() for output in ensemble(images)]
    torch.manual_seed(1)
    wanted = alone(ensemble, images)
    assert all(map(torch.equal, got, wanted))


def test_a_convolution_that_serves_twice_is_folded_once_for_each():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.Linear(1, 3)

        def forward(self, x):
            x = self.norm(self.conv(x))
            return self.head((self.norm(self.conv(x)) + self.conv(x)).mean((2, 3)))

    images = torch.randn(8, 1, 8, 8)
    nets = [Twice(), Twice()]
    for net in nets:
        net(images * 3 + 1)
    ensemble, got, wanted = together(nets, images)
    agree(got, wanted)
    assert ensemble._folded._graphs


def test_host_snapshots_pass_through_two_slots(nets, images):
    nets[1].head.weight.data.mul_(2)
    ensemble = SnapshotEnsemble(nets)
    offloaded = HostOffloaded(ensemble._captures)
    wanted = alone(ensemble, images.cpu())
    for _ in range(2):
        got = [torch.stack(rows) for rows in zip(*offloaded(CPU, images.cpu()), strict=True)]
        assert all(map(torch.equal, got, wanted))
    held = {name: t.data_ptr() for name, t in offloaded.slots[0].items()}
    with torch.no_grad():
        ensemble.models[2].head.weight.zero_()  # where it lies in host memory it is seen by the next call
    wanted = alone(ensemble, images.cpu())
    got = [torch.stack(rows) for rows in zip(*offloaded(CPU, images.cpu()), strict=True)]
    assert all(map(torch.equal, got, wanted)) and not (got[0][2] - ensemble.models[2].head.bias).any()
    assert held == {name: t.data_ptr() for name, t in offloaded.slots[0].items()}
    assert held.keys() == {
        "convolution.weight",
        "convolution.bias",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
        "table",
        "hidden.weight",
        "hidden.bias",
        "tied.bias",
        "head.weight",
        "head.bias",
    }
    ensemble.double()
    double = list(offloaded(CPU, images.cpu().double()))
    assert double[0][0].dtype == torch.float64


def test_host_snapshots_stay_there(nets, images):
    ensemble, got, wanted = SnapshotEnsemble(nets, snapshots_on="cpu"), None, None
    student = Student(ensemble).to(images.device, torch.float64)
    assert {t.device.type for model in ensemble.models for t in model.parameters()} == {"cpu"}
    got = student.teacher(images.double())
    assert got[0].device == images.device and got[0].dtype == torch.float64
    wanted = SnapshotEnsemble(nets).to(images.device, torch.float64)(images.double())
    agree(got, wanted)
    agree(copy.deepcopy(ensemble)(images.double()), wanted)


@pytest.mark.bad_input
def test_snapshots_are_on_the_device_the_host_or_the_ranks(nets):
    with pytest.raises(ValueError, match="snapshots_on must be device, cpu or ranks, got 'disk'"):
        SnapshotEnsemble(nets, snapshots_on="disk")
