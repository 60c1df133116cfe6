"""A Hugging Face run on images teaches a student from eekd's command line."""

import json
import shutil

import pytest
import torch
from tiny import SMALL, compare, language_model, save, transformers

from eekd.data import load
from eekd.hf import SnapshotCallback
from eekd.io.tensors import load_tensors
from eekd.snapshots import SnapshotEnsemble, read_manifest
from eekd.train import __main__ as cli

FILE = """
from transformers import ViTConfig, ViTForImageClassification

def vit(num_classes, in_channels, image_size, width=16):
    return ViTForImageClassification(ViTConfig(
        hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=num_classes,
        num_channels=in_channels, image_size=image_size, patch_size=4, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ))
"""
SMALL_RUN = "--train-limit 100 --device cpu --student.model mlp64 --student.epochs 1 --out run"
STUDENT = ["student", "--checkpoints", "hf-run", "--teacher.model", "vit.py:vit", *SMALL_RUN.split()]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The checkpoints of a plain Trainer on the digits, and the file that makes its model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit.py").write_text(FILE)
    names = {}
    exec(FILE, names)
    torch.manual_seed(0)
    model, digits = names["vit"](10, 1, 8), load("digits")
    images = (digits.train.images[:64].float() / 255 - 0.5) / 0.5
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, digits.train.labels, strict=False)]
    args = transformers.TrainingArguments(
        str(tmp_path / "hf-run"), max_steps=12, per_device_train_batch_size=16, learning_rate=0.01, save_strategy="no",
        use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    transformers.Trainer(
        model, args, train_dataset=rows, processing_class=processor, callbacks=[SnapshotCallback(3)]
    ).train()
    return tmp_path / "hf-run"


def test_a_vit_run_teaches_from_the_command_line(run, tmp_path):
    shutil.copytree(run / "checkpoint-8", run / "checkpoint-9")  # which is no snapshot
    assert cli.main([*STUDENT, "--students", "last", "attention"]) == 0
    settings = json.loads((tmp_path / "run/config.json").read_text())
    names = [path.split("/")[-2] for path in settings["checkpoints"]]
    assert names == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]
    assert settings["teacher"]["mean"] == settings["teacher"]["std"] == [0.5]  # as the run's processor says
    images = load("digits").test.images[:9].float() / 255
    given = read_manifest("run/teacher")["spec"]["normalization"]["given"]
    logits, features = SnapshotEnsemble.load("run/teacher")((images - given["mean"][0]) / given["std"][0])
    want = [transformers.ViTForImageClassification.from_pretrained(run / name) for name in names]
    with torch.no_grad():
        want = torch.stack([model((images - 0.5) / 0.5).logits for model in want])
    torch.testing.assert_close(logits, want, rtol=1e-3, atol=1e-4)
    assert features.shape == (3, 9, 16)
    assert load_tensors(tmp_path / "run/students/attention/student.safetensors")


@pytest.mark.bad_input
def test_what_does_not_fit_is_refused_before_training(run, tmp_path, capsys):
    def refused(message, *more):
        assert cli.main([*STUDENT, *more]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    refused("does not fit this ViTForImageClassification", "--teacher.model-args", "width=32")
    config = json.loads((run / "checkpoint-8/config.json").read_text())
    classes = {str(i): str((i + 1) % 10) for i in range(10)}
    (run / "checkpoint-8/config.json").write_text(json.dumps(config | {"id2label": classes}))
    refused("checkpoint-8 must have the data's classes in their order, got '1' for '0'")
    for content, message in (("[]", "must name the steps of at least one"), ('{"steps": [4, 5]}', "got none of 5")):
        (run / "eekd_snapshots.json").write_text(content)
        refused(message)


def test_from_files_loads_as_transformers_does(run):
    """Folders, sorted by number, hashed, and in names that the live modules do not carry."""
    ensemble = SnapshotEnsemble.from_files(run, load=transformers.ViTForImageClassification.from_pretrained)
    assert len(ensemble) == len(set(ensemble.hashes)) == 3
    pixels = torch.randn(2, 1, 8, 8)
    last = transformers.ViTForImageClassification.from_pretrained(run / "checkpoint-12")
    with torch.no_grad():
        torch.testing.assert_close(ensemble(pixels)[0][-1], last(pixels).logits)


def test_from_files_takes_a_head_that_shares_the_embeddings(tmp_path):
    models = [language_model("gpt2", 16, seed) for seed in (1, 2)]
    run = save(models, tmp_path)
    assert "lm_head.weight" not in load_tensors(run / "checkpoint-5" / "model.safetensors")
    ensemble = SnapshotEnsemble.from_files(run, lambda: SMALL["gpt2"][1](models[0].config), features=False)
    for got, want in zip(ensemble.models, models, strict=True):
        compare(got.state_dict(), want.state_dict(), rtol=0, atol=0)
        assert got.lm_head.weight is got.transformer.wte.weight
