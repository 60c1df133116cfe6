"""Other uses of the snapshots and the methods of others: by their formulas in fp64, in training, and resumed."""

import copy
import dataclasses
import json
import math
import subprocess

import pytest
import torch
import torch.nn.functional as F
from killed import EVERY_STEP, Killed, check_same, go_on, killer
from processes import ENVIRONMENT, TORCHRUN
from torch import nn

from eekd.bank.__main__ import main as bank
from eekd.io.files import read_json
from eekd.io.tensors import load_tensors
from eekd.method.rival_losses import (
    Contrast,
    Hint,
    LearnedAtOne,
    at_loss,
    attention_map,
    dist_loss,
    dkd_loss,
    fused_logits,
)
from eekd.method.rivals import RIVALS
from eekd.train import Session, StudentTrainer, prepare, train, train_student
from eekd.train import __main__ as cli
from eekd.train.config import Config, Student, Teacher
from eekd.train.maps import FeatureMaps
from eekd.train.replay import replay
from eekd.train.rivals import AT, DKD, TRAINERS, Curriculum
from eekd.train.student import read_student
from eekd.train.teaching import BankTeacher, RememberedTeacher, RunningTeacher

CONFIG = Config(
    train_limit=120,
    device="cpu",
    precision="fp32",
    augment="none",
    teacher=Teacher(model="resnet8_w4", epochs=4, snapshots=4, batch_size=40),
    student=Student(model="resnet8_s2", epochs=4, batch_size=40, temperature=2.0),
    students=tuple(RIVALS),
)
STEPS = 3  # of an epoch
LEARNED_AT_ONE = "attention_tau1", "attention_dkd", "attention_dist"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with all rivals, which tests only read."""
    return train(CONFIG, tmp_path_factory.mktemp("rivals") / "run")


def rows(run, name):
    lines = (run / "students" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# ---- formulas ----


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    s, z = (2 * torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)).unbind()
    return s.requires_grad_(), z, torch.randint(5, (7,), generator=generator)


def test_the_correlation_of_a_head_that_starts_at_zero_has_no_gradient(batch):
    s = torch.zeros(7, 5, requires_grad=True)
    loss = dist_loss(s, batch[1].float(), 2.0)
    assert loss.item() == pytest.approx(8.0, rel=1e-4)
    assert torch.autograd.grad(loss, s)[0].abs().max() < 1e-3


def same(loss, leaf, formula):
    """A loss in float32 and its gradient are those of the formula in fp64."""
    wanted = formula(leaf)
    torch.testing.assert_close(loss(leaf.float()).double(), wanted, rtol=1e-5, atol=1e-6)
    got, want = (torch.autograd.grad(f, leaf)[0] for f in (loss(leaf.float()), wanted))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_dkd_is_its_formula(batch, tau):
    s, z, y = batch

    def formula(s):
        total = 0
        for row in range(len(y)):
            p, q = (torch.exp(x[row] / tau) / torch.exp(x[row] / tau).sum() for x in (z, s))
            others = [c for c in range(5) if c != y[row]]
            two = [torch.stack([x[y[row]], x[others].sum()]) for x in (p, q)]
            rest = [x[others] / x[others].sum() for x in (p, q)]
            tckd, nckd = ((a * (a / b).log()).sum() for a, b in (two, rest))
            total = total + tau**2 * (tckd + 8 * nckd) / len(y)
        return total

    same(lambda s: dkd_loss(s, z.float(), y, tau, 8.0), s, formula)


def test_rows_that_are_ignored_do_not_count_in_dkd(batch):
    s, z, y = batch
    ignored = y.clone()
    ignored[[0, 3]] = 9
    counted = ignored != 9
    wanted = dkd_loss(s[counted], z[counted], y[counted], 2.0, 8.0)
    got = dkd_loss(s, z.where(counted[:, None], -torch.inf), ignored, 2.0, 8.0, ignore_index=9)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got, s), torch.autograd.grad(wanted, s))
    assert dkd_loss(s, z, torch.full_like(y, -100), 2.0, 8.0) == 0
    with pytest.raises(ValueError, match=r"^labels must be classes \(B,\) for DKD, got \(7, 5\) of torch.float64$"):
        dkd_loss(s, z, z.softmax(1), 2.0, 8.0)


def test_dist_is_its_formula(batch):
    s, z, _ = batch

    def formula(s):
        q, p = ((x / 4).softmax(1) for x in (s, z))
        rows = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(q, p, strict=True)]
        columns = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(q.t(), p.t(), strict=True)]
        return 16 * (1 - sum(rows) / len(rows)) + 16 * (1 - sum(columns) / len(columns))

    same(lambda s: dist_loss(s, z.float(), 4.0), s, formula)


def test_attention_transfer_is_its_formula():
    torch.manual_seed(0)
    v, u = torch.randn(3, 4, 2, 2, dtype=torch.float64, requires_grad=True), torch.randn(3, 6, 2, 2).double()

    def formula(v):
        maps = [(x**2).mean(1).view(3, 4) for x in (v, u)]
        a, b = (x / (x**2).sum(1, keepdim=True).sqrt() for x in maps)
        return ((a - b) ** 2).mean()

    same(lambda v: at_loss([v, v], [attention_map(u)] * 2), v, lambda v: 2 * formula(v))


def test_a_hint_is_its_formula():
    torch.manual_seed(0)
    v, u, hint = torch.randn(3, 4, 2, 2, dtype=torch.float64, requires_grad=True), torch.randn(3, 6, 2, 2), Hint(4, 6)

    def formula(v):
        weight, bias = (x.double() for x in hint.regressor[0].parameters())
        mapped = torch.einsum("bchw,dc->bdhw", v, weight[..., 0, 0]) + bias[:, None, None]
        mean, var = mapped.mean((0, 2, 3), keepdim=True), mapped.var((0, 2, 3), unbiased=False, keepdim=True)
        return (((mapped - mean) / (var + 1e-5).sqrt()).clamp(min=0) - u).square().mean()

    same(lambda v: hint(v, u), v, formula)


def by_the_formula(contrast, memory, z, drawn, index, v, u):
    """The contrast of a batch in fp64, both embeddings, and z, which is found where it is None."""
    labels, embedded, scales, total = contrast.labels, {}, [], 0
    for name, x in (("student", v), ("teacher", u)):
        layer = getattr(contrast, name)
        embedded[name] = F.normalize(x.double() @ layer.weight.double().t() + layer.bias.double())
    for i, (anchor, other) in enumerate((("student", "teacher"), ("teacher", "student"))):
        right, wrong = [], []
        for a, n in zip(embedded[anchor], index.tolist(), strict=True):
            others = [k for k in drawn.tolist() if labels[k] != labels[n]]
            right.append((a @ memory[other][n] / 0.07).exp())
            wrong.append([(a @ memory[other][k] / 0.07).exp() for k in others])
        scales.append(torch.stack(right + sum(wrong, [])).mean().detach() * len(labels) if z is None else z[i])
        for same, others in zip(right, wrong, strict=True):
            noise, same = len(others) / len(labels), same / scales[i]
            total = total - (same / (same + noise)).log() / len(index)
            total = total - sum((noise / (x / scales[i] + noise)).log() for x in others) / len(index)
    return total, embedded, scales


@pytest.mark.parametrize("negatives", [100, 5])
def test_contrast_is_its_formula(negatives, monkeypatch):
    torch.manual_seed(0)
    drawn = torch.arange(20) if negatives > 20 else torch.tensor([3, 9, 9, 17, 0])
    contrast = Contrast(4, 6, torch.randint(3, (20,)), width=8, negatives=negatives)
    monkeypatch.setattr(torch, "randint", lambda count, size, device: drawn)
    memory = {name: getattr(contrast, f"{name}_memory").double() for name in ("student", "teacher")}
    z = None
    for index in (torch.tensor([3, 7, 11]), torch.tensor([7, 1, 19])):
        v, u = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(3, 6)
        wanted, embedded, z = by_the_formula(contrast, memory, z, drawn, index, v, u)
        loss = contrast(v.float(), u, index)
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=1e-5)
        got, want = (torch.autograd.grad(f, v)[0] for f in (loss, wanted))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
        for name, x in memory.items():
            x[index] = F.normalize(x[index] / 2 + embedded[name].detach() / 2)
            torch.testing.assert_close(getattr(contrast, f"{name}_memory").double(), x, rtol=1e-4, atol=1e-5)


def test_attention_learned_at_one_is_its_formula():
    torch.manual_seed(0)
    s, v = torch.randn(6, 5, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    z, u, y = 3 * torch.randn(4, 6, 5), torch.randn(4, 6, 7), torch.randint(5, (6,))
    learner = LearnedAtOne(temperature=4.0, alpha=0.3, student_dim=3, snapshot_dim=7)
    loss, measured = learner(s, z, y, v, u)

    attention = learner.weigh.loss.attention
    query, keys = attention(v.detach(), u)
    w = torch.einsum("bd,mbd->bm", query, keys).double().softmax(1)
    p, at_one = (torch.einsum("bm,mbc->bc", w, (z.double() / tau).softmax(-1)) for tau in (4.0, 1.0))
    kl = (p * (p.log() - (s.double() / 4).log_softmax(1))).sum(1).mean()
    kd = 0.3 * F.cross_entropy(s.double(), y) + 0.7 * 16 * kl
    learned = -at_one[torch.arange(6), y].log().mean()
    torch.testing.assert_close(loss.double(), kd + learned, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(measured["weights"].double(), w.mean(0), rtol=1e-5, atol=1e-6)
    loss.backward()
    weight = attention.student.weight
    torch.testing.assert_close(weight.grad, torch.autograd.grad(learned, weight)[0], rtol=1e-4, atol=1e-6)
    assert v.grad is None


# ---- in training ----


def test_every_rival_trains_and_is_kept(run):
    assert TRAINERS.keys() == RIVALS.keys()
    for name in RIVALS:
        record, known = read_student(run / "students" / name), rows(run, name)
        assert record["weighting"] == name and all(math.isfinite(row["train_loss"]) for row in known)
        assert len(record["teacher"]["snapshots"]) == (4 if RIVALS[name].all_snapshots else 1)
        assert record["teacher"]["snapshots"][-1]["step"] == 4
        assert ("criterion_sha256" in record) == (name in (*LEARNED_AT_ONE, "fitnet", "crd"))
    ends = {read_student(run / "students" / name)["sha256"] for name in RIVALS}
    assert len(ends) == len(RIVALS)
    memory = load_tensors(run / "students/crd/criterion.safetensors")["teacher_memory"]
    torch.testing.assert_close(memory.norm(dim=1), torch.ones(120))  # every image was seen


def of_stages(network, images):
    """Logits, the outputs of the stages of a resnet8 by side, and the last features."""
    x, maps = images, []
    for layer in network.trunk:
        x = layer(x)
        maps.append(x.clone())
    features = x.mean((2, 3))
    return network.classifier(features), {x.shape[-1]: x for x in maps}, features


@pytest.mark.parametrize("name", ["dkd", "dist", "fitnet", "at", "crd"])
def test_the_last_snapshot_teaches_by_the_published_beta(run, name):
    trainer = TRAINERS[name](Session(CONFIG), run / "teacher", name=name)
    batch = next(iter(trainer.batches_from(0)))
    trainer.trained.train()
    state = copy.deepcopy(trainer.criterion.state_dict()) if trainer.criterion else {}
    loss, measured = trainer.compute_loss(batch)

    snapshot = trainer.session.load_snapshots(run / "teacher", [-1]).models[-1]
    with torch.no_grad():
        logits, own, v = of_stages(trainer.network, batch.images)
        z, theirs, u = of_stages(snapshot, batch.images)
        if state:
            trainer.criterion.load_state_dict(state)
        added = {
            "dkd": lambda: dkd_loss(logits, z, batch.labels, 2.0, 8.0),
            "dist": lambda: 2 * dist_loss(logits, z, 2.0),
            "fitnet": lambda: 100 * trainer.criterion(own[2], theirs[2]),
            "at": lambda: 1000 * at_loss([own[4], own[2]], [attention_map(theirs[4]), attention_map(theirs[2])]),
            "crd": lambda: 0.8 * trainer.criterion(v, u, batch.index),
        }[name]()
    torch.testing.assert_close(measured["added"], added, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(loss.detach(), F.cross_entropy(logits, batch.labels) + added, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fusion", ["probability", "logit"])
@pytest.mark.parametrize("name", ["attention_dkd", "attention_dist"])
def test_the_fused_prediction_teaches_by_the_losses_of_others(run, name, fusion):
    student = dataclasses.replace(CONFIG.student, beta=3.0, fusion=fusion)
    config = dataclasses.replace(CONFIG, student=student, students=(name,))
    trainer = TRAINERS[name](Session(config), run / "teacher", name=name)
    batch = next(iter(trainer.batches_from(0)))
    trainer.trained.train()
    loss, measured = trainer.compute_loss(batch)

    z, u, y = batch.teacher.logits.double(), batch.teacher.features, batch.labels
    with torch.no_grad():
        logits, _, v = of_stages(trainer.network, batch.images)
    query, keys = trainer.criterion.weigh.loss.attention(v, u)
    w = torch.einsum("bd,mbd->bm", query, keys).double().softmax(1)
    mixed = torch.einsum("bm,mbc->bc", w, z if fusion == "logit" else (z / 2).softmax(-1))
    p = (mixed / 2).softmax(1) if fusion == "logit" else mixed
    at_one = (mixed if fusion == "logit" else torch.einsum("bm,mbc->bc", w, z.softmax(-1)).log()).log_softmax(1)
    learned = -at_one[torch.arange(len(y)), y].mean()
    target = 2 * p.detach().log()  # logits of which softmax(. / 2) is p
    added = dkd_loss(logits, target, y, 2.0, 3.0) if name == "attention_dkd" else 3 * dist_loss(logits, target, 2.0)
    torch.testing.assert_close(measured["weights"].double(), w.mean(0), rtol=1e-4, atol=1e-5)
    alone = F.cross_entropy(logits, y) + added
    for got, want in ((measured["loss"], alone.detach()), (loss, alone + learned)):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-3, atol=1e-4)
    loss.backward()
    weight = trainer.criterion.weigh.loss.attention.student.weight  # which the student's loss does not train
    torch.testing.assert_close(weight.grad, torch.autograd.grad(learned, weight)[0].float(), rtol=1e-3, atol=1e-6)


def test_fused_logits_survive_weights_of_zero():
    z = torch.tensor([[[0.0, 300.0, -300.0]], [[1.0, 2.0, 3.0]]])
    fused = fused_logits(z, torch.tensor([[1.0, 0.0]]), 4.0)
    torch.testing.assert_close((fused / 4).softmax(1), (z[0] / 4).softmax(1))


@pytest.mark.parametrize("name, usual", [("dkd", (4, 8)), ("attention_dkd", (2, 0.5)), ("attention_tau1", (5, None))])
def test_a_student_has_the_published_settings_of_its_method(name, usual):
    given = dataclasses.replace(CONFIG, student=Student(temperature=3.0, beta=7.0), students=(name,))
    published = TRAINERS[name].settings(dataclasses.replace(CONFIG, student=Student()))
    assert (published.temperature, published.beta) == usual
    assert TRAINERS[name].settings(given) == given.student


@pytest.mark.parametrize("name", LEARNED_AT_ONE)
@pytest.mark.parametrize("setting", [{"attention_objective": "kl"}, {"detach_query": False}], ids=str)
def test_settings_that_would_not_count_are_refused(run, name, setting):
    session = Session(dataclasses.replace(CONFIG, student=dataclasses.replace(CONFIG.student, **setting)))
    with pytest.raises(ValueError, match=f"^{name} learns its weights from the label alone: "):
        TRAINERS[name](session, run / "teacher", name=name)


def test_what_is_added_counts_by_beta(run):
    student = dataclasses.replace(CONFIG.student, beta=0.0)
    session = Session(dataclasses.replace(CONFIG, student=student, students=("dkd",)))
    plain = train_loss = None
    for name, trainer in TRAINERS.items():
        if name not in ("dist", "fitnet", "at", "crd"):
            continue
        made = trainer(session, run / "teacher", name=name)
        batch = next(iter(made.batches_from(0)))
        loss, measured = made.compute_loss(batch)
        assert measured["added"] == 0
        train_loss, plain = loss.item(), plain or loss.item()
        assert train_loss == pytest.approx(plain)


def test_the_curriculum_meets_one_snapshot_after_another(run):
    met = []

    class Noted(Curriculum):
        def _next_teacher(self):
            made = super()._next_teacher()
            met.append((self.epoch, made.val[0].logits.clone()))
            return made

    Noted(Session(CONFIG), run / "teacher").fit()
    every = StudentTrainer(Session(CONFIG), run / "teacher", "uniform").teacher.val[0].logits
    assert [epoch for epoch, _ in met] == [0, 1, 2, 3]
    for (_, logits), snapshot in zip(met, every, strict=True):
        torch.testing.assert_close(logits, snapshot[None])
    for epochs, wanted in ((2, [1, 3]), (8, [0, 0, 1, 1, 2, 2, 3, 3])):
        trainer = Curriculum(
            Session(dataclasses.replace(CONFIG, student=dataclasses.replace(CONFIG.student, epochs=epochs))),
            run / "teacher",
        )
        stages = []
        for trainer.epoch in range(epochs):
            stages.append(trainer._stage(4))
        assert stages == wanted


def test_dkd_rises_in_the_first_twelfth(run):
    longer = dataclasses.replace(CONFIG, student=dataclasses.replace(CONFIG.student, epochs=48))
    trainer = DKD(Session(longer), run / "teacher")
    batch = next(iter(trainer.batches_from(0)))
    added = {}
    for trainer.epoch in (0, 3, 40):
        added[trainer.epoch] = trainer.compute_loss(batch)[1]["added"].item()
    assert added[3] == pytest.approx(4 * added[0], rel=1e-5) and added[40] == pytest.approx(added[3], rel=1e-5)


@pytest.mark.parametrize("steps", [
    (14, 25, 40, 52, 62, 75, 90), pytest.param((17, 29, 33, 46, 65, 77, 83, 95), marks=pytest.mark.full)
])  # fmt: skip
def test_resumed_to_the_bit(run, tmp_path, steps):
    session = prepare(dataclasses.replace(CONFIG, save_every=EVERY_STEP))
    kill = killer(*steps)
    with pytest.raises(Killed):
        train(session.config, tmp_path / "run", session=session, progress=kill)
    assert go_on(tmp_path / "run", session, kill) == len(steps) - 1
    check_same(run, tmp_path / "run")


@pytest.mark.full
def test_under_torchrun(run, tmp_path):
    """Two processes keep the same weights; CRD, whose memory each would have for itself, is refused."""
    command = [*TORCHRUN, "--nproc-per-node", "2", "-m", "eekd.train", "student", "--teacher", run, "--out", "two"]
    flags = "--device cpu --precision fp32 --student.model resnet8_s2 --student.epochs 2 --student.batch-size 40"
    more = [*flags.split(), "--check-replicas", "1", "--students"]
    for names, code in (([name for name in RIVALS if name != "crd"], 0), (["crd"], 2)):
        words = map(str, [*command, *more, *names])
        done = subprocess.run([*words], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        assert (done.returncode == 0) == (code == 0), done.stderr
    assert "error: crd must be trained by one process, got 2\n" in done.stderr
    assert {path.name for path in (tmp_path / "two/students").iterdir()} == RIVALS.keys() - {"crd"}


def test_maps_are_remembered_where_images_do_not_vary(run, tmp_path):
    assert not bank(["--teacher", str(run), "--out", str(tmp_path / "bank"), "--views", "1"])
    from_bank = dataclasses.replace(CONFIG, bank=str(tmp_path / "bank"))
    varied = dataclasses.replace(CONFIG, augment="crop")
    kinds = {"at": RememberedTeacher, "dkd": BankTeacher, "crd": BankTeacher, "fitnet": RememberedTeacher}
    for name, kind in kinds.items():
        made = TRAINERS[name](Session(from_bank), run / "teacher", name=name)
        assert type(made.teacher) is kind
    running = AT(Session(varied), run / "teacher")
    assert type(running.teacher) is RunningTeacher
    batch = next(iter(AT(Session(CONFIG), run / "teacher").batches_from(0)))
    torch.testing.assert_close(batch.teacher.features, running.teacher(batch).features)
    record = train_student(from_bank, run / "teacher", "crd", tmp_path / "crd")
    assert record["teacher"]["bank"]


def test_with_a_bank_no_snapshot_is_loaded_where_the_target_is_not_validated(run, tmp_path, monkeypatch):
    assert not bank(["--teacher", str(run), "--out", str(tmp_path / "bank"), "--views", "1"])
    config = dataclasses.replace(CONFIG, bank=str(tmp_path / "bank"))
    monkeypatch.setattr(Session, "load_snapshots", None)
    for name in {*RIVALS} - {"curriculum", "fitnet", "at"}:
        train_student(config, run / "teacher", name, tmp_path / name)
    with pytest.raises(TypeError):
        train_student(config, run / "teacher", "curriculum", tmp_path / "curriculum")


def test_feature_maps_are_the_last_of_each_size():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.down = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 5, 2, stride=2)
            self.more, self.head = nn.Sequential(nn.Conv2d(5, 5, 1), nn.ReLU()), nn.Linear(5, 4)

        def forward(self, x):
            self.kept = self.more(self.down(self.stem(x)))
            return self.head(self.kept.mean((2, 3)))

    net = Net()
    maps = FeatureMaps(net, lambda network, images: network(images), torch.zeros(1, 1, 4, 4))
    assert maps.shapes == {(4, 4): (3, 4, 4), (2, 2): (5, 2, 2)} and net.training and maps.take() == {}
    net(torch.randn(2, 1, 4, 4))
    taken = maps.take()
    assert taken[2, 2] is net.kept and taken[4, 4].shape == (2, 3, 4, 4) and not maps.take()


# ---- what is wrong ----


@pytest.mark.bad_input
@pytest.mark.parametrize("name, changed, told", [
    ("fitnet", dict(model="mlp64"), "student.model must have feature maps of a size that the teacher's has for fitnet, "
     "got none in mlp64 and 8 x 8, 4 x 4, 2 x 2 in resnet8_w4"),
    ("dkd", dict(mixup=0.2), "dkd needs one class for each image: leave out mixup, cutmix and label_smoothing"),
    ("dkd", dict(label_smoothing=0.1), "dkd needs one class for each image: .*"),
    ("crd", dict(cutmix=1.0), "crd needs one class for each image: .*"),
])  # fmt: skip
def test_what_a_rival_cannot_do_is_said_first(name, changed, told):
    config = dataclasses.replace(CONFIG, students=(name,), student=dataclasses.replace(CONFIG.student, **changed))
    with pytest.raises(ValueError, match=f"^{told}$"):
        prepare(config)


@pytest.mark.bad_input
def test_names_and_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--students", "dkb", "--out", "run"]) == 2
    assert "did you mean 'dkd'?" in capsys.readouterr().err
    with pytest.raises(ValueError, match="^student.beta must be at least 0, got -1$"):
        Student(beta=-1)


@pytest.mark.bad_input
def test_a_bank_without_all_classes(run, tmp_path):
    assert not bank(["--teacher", str(run), "--out", str(tmp_path / "bank"), "--views", "1", "--top-k", "3"])
    config = dataclasses.replace(CONFIG, bank=str(tmp_path / "bank"))
    for name in ("dkd", "dist", *LEARNED_AT_ONE):
        with pytest.raises(ValueError, match=f"^{name} needs the logits of all classes, and .*bank keeps 3 of them$"):
            train_student(config, run / "teacher", name, tmp_path / name)


@pytest.mark.bad_input
def test_a_loss_that_replay_does_not_know_is_not_replayed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(DKD, "added", lambda self, logits, *_: logits.sum() * math.nan)
    with pytest.raises(FloatingPointError, match="^dkd: the loss became nan"):
        train_student(CONFIG, run / "teacher", "dkd", tmp_path / "dkd")
    path = next((tmp_path / "dkd").glob("non-finite-*.json"))
    assert read_json(path)["method"] == "DKD"
    with pytest.raises(ValueError, match="got 'DKD', which has a loss of its own"):
        replay(path)
