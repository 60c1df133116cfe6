"""Batches, classes and images that do not fit the teachers are refused in one sentence."""

import pytest
import torch
from tiny import (
    batch_for,
    classifier,
    collate,
    language_model,
    loss_of,
    refused,
    run_of,
    save,
    settings,
    trainer_of,
    transformers,
)

from eekd.hf import EEKDTrainer


@pytest.mark.bad_input
def test_batches_that_the_teachers_cannot_take(tmp_path):
    data = [{"input_ids": [1] * 40}] * 16
    trainer = trainer_of(language_model(n_positions=64), run_of("gpt2", tmp_path), tmp_path, data=data)
    with pytest.raises(ValueError, match="checkpoint-5 must have the positions and tokens .* more than 32 positions"):
        trainer.train()


@pytest.mark.bad_input
def test_classes_that_are_others(tmp_path):
    student = classifier("bert", id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
    names = dict(id2label={0: "b", 1: "a", 2: "c"}, label2id={"b": 0, "a": 1, "c": 2})
    run = save([classifier("bert", 24, 1, **names)], tmp_path / "run")
    refused("must have the student's classes, got 'b' for class 0", student, run, tmp_path)
    run = save([classifier("bert", 24, 1)], tmp_path / "other")
    refused("classify into one of several", classifier("bert", problem_type="regression"), run, tmp_path)


@pytest.mark.bad_input
def test_batches_without_labels(tmp_path):
    trainer = trainer_of(
        language_model(), run_of("gpt2", tmp_path), tmp_path,
        collator=lambda samples: {k: v for k, v in collate(samples).items() if k != "labels"},
    )  # fmt: skip
    with pytest.raises(ValueError, match="a batch must have labels"):
        trainer.train()


@pytest.mark.bad_input
def test_labels_that_are_no_classes(tmp_path):
    run = save([classifier("bert", 24, 1)], tmp_path / "run")
    trainer, batch = trainer_of(classifier("bert"), run, tmp_path), batch_for("bert")
    with pytest.raises(ValueError, match="labels must be whole numbers, one for each row, got torch.float32"):
        loss_of(trainer, batch | {"labels": torch.rand(6, 3)})


@pytest.mark.bad_input
def test_a_teacher_of_several_labels(tmp_path):
    run = save([classifier("bert", 24, 1, problem_type="multi_label_classification")], tmp_path / "run")
    refused("checkpoint-5 must classify into one of several classes", classifier("bert"), run, tmp_path)


@pytest.mark.bad_input
def test_images_that_the_teachers_saw_otherwise(tmp_path):
    run = run_of("vit", tmp_path)

    def processor(**options):
        return transformers.ViTImageProcessor(size={"height": 8, "width": 8}, **options)

    processor(image_mean=[0.5], image_std=[0.5]).save_pretrained(run / "checkpoint-5")
    options = dict(args=settings(tmp_path), teacher_checkpoints=run)
    EEKDTrainer(classifier("vit"), processing_class=processor(image_mean=[0.5], image_std=[0.5]), **options)
    for other, match in (
        (dict(image_mean=[0.4], image_std=[0.5]), r"student's image_mean \[0.4\], .* got \[0.5\]"),
        (dict(image_mean=[0.5], image_std=[0.5], do_rescale=False), "student's do_rescale False, .* got True"),
    ):
        with pytest.raises(ValueError, match=match):
            EEKDTrainer(classifier("vit"), processing_class=processor(**other), **options)
