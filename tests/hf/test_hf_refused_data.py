"""Batches, classes and images that do not fit the teachers are refused in one sentence."""

import pytest
import tiny
import torch
import transformers

from eekd.hf import EEKDTrainer


@pytest.mark.bad_input
def test_batches_that_the_teachers_cannot_take(tmp_path):
    data = [{"input_ids": [1] * 40}] * 16
    trainer = tiny.trainer_of(tiny.language_model(n_positions=64), tiny.run_of("gpt2", tmp_path), tmp_path, data=data)
    with pytest.raises(ValueError, match="checkpoint-5 must have the positions and tokens .* more than 32 positions"):
        trainer.train()


@pytest.mark.bad_input
def test_classes_that_are_others(tmp_path):
    student = tiny.classifier("bert", id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
    names = dict(id2label={0: "b", 1: "a", 2: "c"}, label2id={"b": 0, "a": 1, "c": 2})
    run = tiny.save([tiny.classifier("bert", 24, 1, **names)], tmp_path / "run")
    tiny.refused("must have the student's classes, got 'b' for class 0", student, run, tmp_path)
    run = tiny.save([tiny.classifier("bert", 24, 1)], tmp_path / "other")
    tiny.refused("classify into one of several", tiny.classifier("bert", problem_type="regression"), run, tmp_path)


@pytest.mark.bad_input
def test_batches_without_labels(tmp_path):
    trainer = tiny.trainer_of(
        tiny.language_model(), tiny.run_of("gpt2", tmp_path), tmp_path,
        collator=lambda samples: {k: v for k, v in tiny.collate(samples).items() if k != "labels"},
    )  # fmt: skip
    with pytest.raises(ValueError, match="a batch must have labels"):
        trainer.train()


@pytest.mark.bad_input
def test_labels_that_are_no_classes(tmp_path):
    run = tiny.save([tiny.classifier("bert", 24, 1)], tmp_path / "run")
    trainer, batch = tiny.trainer_of(tiny.classifier("bert"), run, tmp_path), tiny.batch_for("bert")
    with pytest.raises(ValueError, match="labels must be whole numbers, one for each row, got torch.float32"):
        tiny.loss_of(trainer, batch | {"labels": torch.rand(6, 3)})


@pytest.mark.bad_input
def test_a_teacher_of_several_labels(tmp_path):
    run = tiny.save([tiny.classifier("bert", 24, 1, problem_type="multi_label_classification")], tmp_path / "run")
    tiny.refused("checkpoint-5 must classify into one of several classes", tiny.classifier("bert"), run, tmp_path)


@pytest.mark.bad_input
def test_images_that_the_teachers_saw_otherwise(tmp_path):
    run = tiny.run_of("vit", tmp_path)

    def processor(**options):
        return transformers.ViTImageProcessor(size={"height": 8, "width": 8}, **options)

    processor(image_mean=[0.5], image_std=[0.5]).save_pretrained(run / "checkpoint-5")
    options = dict(args=tiny.settings(tmp_path), teacher_checkpoints=run)
    EEKDTrainer(tiny.classifier("vit"), processing_class=processor(image_mean=[0.5], image_std=[0.5]), **options)
    for other, match in (
        (dict(image_mean=[0.4], image_std=[0.5]), r"student's image_mean \[0.4\], .* got \[0.5\]"),
        (dict(image_mean=[0.5], image_std=[0.5], do_rescale=False), "student's do_rescale False, .* got True"),
    ):
        with pytest.raises(ValueError, match=match):
            EEKDTrainer(tiny.classifier("vit"), processing_class=processor(**other), **options)
