"""Checkpoint folders, adapters and snapshots become teachers."""

import shutil

import pytest
import tiny
import torch
import transformers

from eekd.hf import EEKDTrainer, SnapshotCallback, Teachers
from eekd.hf.checkpoints import checkpoint_folders


def test_checkpoints_come_in_the_order_of_their_numbers(tmp_path):
    for step in (10, 9, 100):
        tiny.language_model(seed=step).save_pretrained(tmp_path / f"checkpoint-{step}")
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert [path.name for path in checkpoint_folders(tmp_path, 2)] == ["checkpoint-9", "checkpoint-100"]
    assert [path.name for path in checkpoint_folders(tmp_path / "checkpoint-9")] == ["checkpoint-9"]
    assert len(Teachers.load(tmp_path, last=True)) == 1


def test_the_weights_of_a_run_beside_its_checkpoints_are_named(tmp_path, recwarn):
    run = tiny.run_of("gpt2", tmp_path)
    assert len(Teachers.load(run)) == 2 and not [w for w in recwarn if "read as its" in str(w.message)]
    tiny.language_model("gpt2", 24, 3).save_pretrained(run)
    with pytest.warns(UserWarning, match="run is read as its 2 folders of checkpoints, without model.safetensors") as w:
        trainer = tiny.trainer_of(tiny.language_model(), run, tmp_path, weighting="last")
    assert trainer.teachers.names == [str(run / "checkpoint-10")]
    assert sum("read as its" in str(warning.message) for warning in w) == 1
    adapters, _ = tiny.lora_run(tmp_path / "lora", tiny.language_model("llama", 24, 1), target_modules=["q_proj"])
    for file in (adapters / "checkpoint-2").iterdir():
        shutil.copy(file, adapters)
    with pytest.warns(UserWarning, match="as its 2 folders of checkpoints, without adapter_model.safetensors"):
        checkpoint_folders(adapters)


def test_evenly_spaced_models_in_memory(tmp_path):
    models = [tiny.language_model("gpt2", 24, seed) for seed in range(1, 6)]
    for options, want in ((dict(weighting="uniform"), [1, 4]), (dict(weighting="last"), [4])):
        trainer = EEKDTrainer(tiny.language_model(), tiny.settings(tmp_path, snapshots=2, **options), teachers=models)
        assert [models.index(model) for model in trainer.teachers] == want
        assert trainer.teachers.names == [f"teacher {m + 1}" for m in want]


@pytest.mark.parametrize("kind", ["gpt2", "vit"])
def test_teachers_are_the_models_that_were_saved(kind, tmp_path):
    run, models = tiny.run_of(kind, tmp_path), [tiny.model_of(kind, 24, s) for s in (1, 2)]
    teachers = Teachers.load(run)
    for got, want in zip(teachers, models, strict=True):
        tiny.compare(got.state_dict(), want.state_dict(), rtol=0, atol=0)
        assert not got.training and not any(p.requires_grad for p in got.parameters())


def test_a_sharded_checkpoint_is_read_and_a_missing_shard_is_named(tmp_path):
    model = tiny.language_model("llama", 24, 1)
    model.save_pretrained(tmp_path / "checkpoint-1", max_shard_size="4KB")
    shards = sorted((tmp_path / "checkpoint-1").glob("model-*.safetensors"))
    assert len(shards) > 1
    tiny.compare(next(iter(Teachers.load(tmp_path))).state_dict(), model.state_dict(), rtol=0, atol=0)
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=shards[0].name):
        Teachers.load(tmp_path)


def test_the_callback_saves_evenly_spaced_snapshots_which_then_teach(tmp_path):
    args = transformers.TrainingArguments(
        str(tmp_path / "teacher"), max_steps=10, save_strategy="steps", save_steps=4, use_cpu=True, report_to="none",
        per_device_train_batch_size=2, disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(
        tiny.language_model("gpt2", 24),
        args,
        train_dataset=tiny.Texts(),
        data_collator=tiny.collate,
        callbacks=[SnapshotCallback(3)],
    ).train()
    there = sorted(path.name for path in (tmp_path / "teacher").glob("checkpoint-*"))
    assert there == ["checkpoint-10", "checkpoint-3", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    names = [path.name for path in checkpoint_folders(tmp_path / "teacher")]
    assert names == ["checkpoint-3", "checkpoint-6", "checkpoint-10"]
    tiny.trained(tmp_path, tiny.language_model(), tmp_path / "teacher", max_steps=1)
    shutil.rmtree(tmp_path / "teacher" / "checkpoint-6")
    with pytest.raises(FileNotFoundError, match=r"got none of 6\b"):
        Teachers.load(tmp_path / "teacher")


def test_training_args_are_never_unpickled(tmp_path, monkeypatch):
    run = tiny.run_of("gpt2", tmp_path)
    for folder in run.iterdir():
        (folder / "training_args.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch.load was called"))
    assert len(Teachers.load(run)) == 2


@pytest.mark.parametrize("fusion", ["probability", "logit"])
def test_adapters_of_one_base_teach_as_merged_models_do(fusion, tmp_path):
    run, merged = tiny.lora_run(
        tmp_path, tiny.language_model("llama", 24, 1), target_modules=["q_proj", "v_proj", "up_proj"]
    )
    student, options = tiny.language_model("llama"), dict(weighting="linear_increase", fusion=fusion)
    batch = tiny.collate([tiny.Texts()[i] for i in range(6)])
    got = tiny.loss_of(adapters := tiny.trainer_of(student, run, tmp_path, **options), batch)
    assert len(adapters.teachers) == 2 and len(adapters.teachers.models) == 1
    assert not any(p.requires_grad for p in adapters.teachers.models[0].parameters())
    assert all(head is adapters.task.heads[0] for head in adapters.task.heads)  # one projection for all
    whole = EEKDTrainer(student, tiny.settings(tmp_path, **options), teachers=merged, data_collator=tiny.collate)
    want = tiny.loss_of(whole, batch)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    tiny.compare(got[1], want[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*(t.task.teach(batch, t.accelerator.autocast)["hidden"] for t in (adapters, whole)),
                               rtol=1e-4, atol=1e-5)  # fmt: skip


def test_adapters_of_a_classifier_bring_heads_of_their_own(tmp_path):
    run, merged = tiny.lora_run(tmp_path, tiny.classifier("bert", 24, 1), target_modules=["query"], task_type="SEQ_CLS")
    student, batch = tiny.classifier("bert"), tiny.batch_for("bert")
    trainer = tiny.trainer_of(student, run, tmp_path, weighting="attention")
    tiny.loss_of(trainer, batch)
    said = trainer.task.teach(batch, trainer.accelerator.autocast)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        want = [model(**inputs).logits for model in merged]
        features = [model.bert(**inputs).pooler_output for model in merged]
    torch.testing.assert_close(said["logits"], want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(said["features"], torch.stack(features), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(want[0], want[1], atol=1e-2)


def test_adapters_need_the_memory_of_one_model(tmp_path):
    run, _ = tiny.lora_run(tmp_path, tiny.language_model("llama", 64, 1), 4, target_modules=["q_proj", "v_proj"])
    teachers = Teachers.load(run)
    base = sum(p.numel() for p in tiny.language_model("llama", 64, 1).parameters())
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for model in teachers.models
                for p in model.parameters()}  # fmt: skip
    assert 4 * base < sum(storages.values()) < 4 * base * 1.3  # float32


def test_a_student_with_an_adapter_trains_it_alone(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft, of the extra hf")
    student = peft.get_peft_model(
        tiny.language_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    before = {name: p.clone() for name, p in student.named_parameters()}
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    trainer = tiny.trained(
        tmp_path, student, tiny.save([tiny.language_model("llama", 24, 1)], tmp_path / "run"), **options
    )
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
    state = {k: v.clone() for k, v in student.state_dict().items()}
    with torch.no_grad():
        for p in student.parameters():
            if p.requires_grad:
                p.zero_()
    again = tiny.trainer_of(student, tmp_path / "run", tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "student-run" / "checkpoint-2"))
    tiny.compare(student.state_dict(), state, rtol=0, atol=0)
    tiny.compare(again.criterion.state_dict(), trainer.criterion.state_dict(), rtol=0, atol=0)
