"""Settings of the model itself: rates by layer, checkpointed gradients, its own arguments."""

import dataclasses
import json
import re

import pytest
import torch
from killed import NETS

import eekd
from eekd import models
from eekd.io.files import read_json
from eekd.train import StudentTrainer, train
from eekd.train.config import Config, Student, Teacher
from eekd.train.estimate import plan
from eekd.train.optim import build_optimizer
from eekd.train.presets import preset
from eekd.train.session import Session

bad_input = pytest.mark.bad_input


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(NETS)
    return path


def vit(**more):
    pytest.importorskip("timm")
    small = "patch_size=14", "embed_dim=24", "depth=4", "num_heads=2"
    args = more.pop("model_args", ())
    return Student(model="timm:vit_tiny_patch16_224", model_args=small + args, optimizer="adamw", lr=1e-3, **more)


def session_of(student: Student) -> Session:
    return Session(Config(data="digits", image_size=28, device="cpu", precision="fp32", student=student))


def test_layers_learn_the_slower_the_further_in_front():
    session = session_of(vit(layer_decay=0.5, weight_decay=0.05, epochs=1))
    network = session.network(session.config.student, 0)
    optimizer = build_optimizer(session.config.student, network)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    named = dict(network.named_parameters())
    assert len(found) == len(named) == sum(len(group["params"]) for group in optimizer.param_groups)
    order = "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight", "blocks.3.mlp.fc1.weight"
    scales = [found[id(named[name])]["lr_scale"] for name in order]
    assert scales == sorted(set(scales)) and found[id(named["head.weight"])].get("lr_scale", 1) == 1
    for name, decay in {"head.weight": 0.05, "head.bias": 0, "pos_embed": 0, "cls_token": 0, "norm.weight": 0}.items():
        assert found[id(named[name])]["weight_decay"] == decay, name
    from timm.optim import param_groups_layer_decay

    theirs = param_groups_layer_decay(network, 0.05, network.no_weight_decay(), layer_decay=0.5)
    for group in theirs:
        for parameter in group["params"]:
            ours = found[id(parameter)]
            assert (ours.get("lr_scale", 1), ours["weight_decay"]) == (group["lr_scale"], group["weight_decay"])


def test_a_layers_rate_is_used(tmp_path):
    session = session_of(vit(layer_decay=0.5, epochs=1))
    trainer = StudentTrainer(session, None, "ce")
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    trainer.train_step([next(trainer.batches_from(0))])
    moved = {name: (p - before[name]).abs().max().item() for name, p in trainer.network.named_parameters()}
    scales = {id(p): group.get("lr_scale", 1) for group in trainer.optimizer.param_groups for p in group["params"]}
    scale = scales[id(trainer.network.patch_embed.proj.weight)]
    assert moved["patch_embed.proj.weight"] == pytest.approx(scale * moved["head.weight"], rel=0.05) and scale < 0.1


def test_checkpointed_gradients_are_the_gradients(tmp_path):
    grads = []
    for on in (False, True):
        session = session_of(vit(grad_checkpointing=on, epochs=1, model_args=("drop_path_rate=0.5",)))
        trainer = StudentTrainer(session, None, "ce")
        assert getattr(trainer.network, "grad_checkpointing", False) == on
        loss, _ = trainer.compute_loss(next(trainer.batches_from(0)))
        loss.backward()
        grads.append([p.grad for p in trainer.network.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100", "convnext_atto"])
def test_layers_of_convolutional_networks_learn_at_timms_rates(name):
    timm = pytest.importorskip("timm")
    phase = Student(model=f"timm:{name}", optimizer="adamw", layer_decay=0.7, weight_decay=0.05, epochs=1)
    network = models.build(phase.model, num_classes=10, in_channels=3, image_size=32)
    found = {id(p): group for group in build_optimizer(phase, network).param_groups for p in group["params"]}
    theirs = timm.optim.param_groups_layer_decay(network, 0.05, layer_decay=0.7)
    assert sum(len(group["params"]) for group in theirs) == len(found) and len({g["lr_scale"] for g in theirs}) > 2
    for group in theirs:
        for parameter in group["params"]:
            ours = found[id(parameter)]
            assert (ours.get("lr_scale", 1), ours["weight_decay"]) == (group["lr_scale"], group["weight_decay"])


def test_the_plan_knows_that_less_is_kept():
    kept = [plan(session_of(vit(grad_checkpointing=on, epochs=1)))[-1]["memory"] for on in (False, True)]
    assert kept[1] < 0.8 * kept[0]


def test_a_models_own_arguments_are_kept_with_it(tmp_path):
    student = vit(model_args=("drop_path_rate=0.3", "class_token=false", "global_pool=avg"), epochs=1)
    config = Config(data="digits", image_size=28, device="cpu", precision="fp32", train_limit=100, students=("ce",),
                    teacher=Teacher(epochs=1, snapshots=1), student=student)  # fmt: skip
    out = train(config, tmp_path / "run")
    spec = read_json(out / "students/ce/student.json")["spec"]
    assert spec["args"] == {"patch_size": 14, "embed_dim": 24, "depth": 4, "num_heads": 2, "drop_path_rate": 0.3,
                            "class_token": False, "global_pool": "avg"}  # fmt: skip
    assert models.build(**spec).cls_token is None
    loaded = eekd.load_student(out)
    assert loaded.network.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert loaded(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    loaded.save(tmp_path / "exported")
    again = eekd.load_student(tmp_path / "exported")
    assert torch.equal(again(torch.ones(1, 1, 28, 28)), loaded(torch.ones(1, 1, 28, 28)))


@pytest.mark.full
@pytest.mark.parametrize("name", ["imagenet-r34-r18", "imagenet-deit-s", "finetune"])
def test_the_recipes_of_presets_train_something_small(tmp_path, name):
    config, small = preset(name), dict(epochs=2, batch_size=60, warmup_epochs=0.5, weights=None)
    kind = vit(model_args=config.student.model_args)
    if config.student.schedule == "step":
        small["warmup_epochs"] = 0
    out = train(
        dataclasses.replace(
            config, data="digits", image_size=28, train_limit=200, val_fraction=0.1, workers=1, precision="fp32",
            teacher=dataclasses.replace(config.teacher, model="resnet8_w4", layer_decay=1.0, snapshots=2, **small),
            student=dataclasses.replace(config.student, model=kind.model, model_args=kind.model_args, **small),
        ),
        tmp_path / "run",
    )  # fmt: skip
    for folder in ("teacher", "students/ce", "students/last", "students/attention"):
        losses = [json.loads(line)["val_loss"] for line in (out / folder / "metrics.jsonl").read_text().splitlines()]
        assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)


@bad_input
@pytest.mark.parametrize("args, said", [
    ({"drop_path": 1}, "args must be arguments of timm's 'vit_tiny_patch16_224'"),
    ({"pretrained": True}, "args must be those of the model 'vit_tiny_patch16_224' itself, got pretrained"),
    ({"checkpoint_path": "x.pt"}, "got checkpoint_path"),
    ({"pretrained_strict": False}, "got pretrained_strict"),
    ({"num_classes": 3}, "args must leave num_classes to the data"),
    ({"drop_rate": {"a": 1}}, "args must be numbers, truths, texts or lists"),
    ([1], "args must be numbers, truths, texts or lists"),
])  # fmt: skip
def test_arguments_that_the_model_lacks_or_that_load_something(args, said):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=re.escape(said)):
        models.build("timm:vit_tiny_patch16_224", num_classes=2, image_size=224, args=args)


@bad_input
def test_arguments_of_eekds_own_models_and_of_factories(nets):
    with pytest.raises(ValueError, match="args must be arguments of 'resnet20', got width_of_all"):
        models.build("resnet20", num_classes=2, args={"width_of_all": 3})
    assert models.build(f"{nets}:net", num_classes=2, in_channels=1, args={"width": 7})[0].out_channels == 7
    with pytest.raises(TypeError, match="with the keywords num_classes, in_channels, image_size, deep"):
        models.build(f"{nets}:net", num_classes=2, in_channels=1, args={"deep": 7})
