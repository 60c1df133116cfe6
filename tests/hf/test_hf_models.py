"""Models as people have them: tied heads, 16 bits, adapters, packed and masked batches, grown vocabularies."""

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers

from eekd.hf import EEKDTrainer

QWEN = dict(tie_word_embeddings=True, use_sliding_window=True, sliding_window=4, max_window_layers=0)


def check(student, teachers, folder, batch, **options):
    """Loss and gradients of a batch are those of the formula, with the models' own logits."""
    options = dict(weighting="uniform", temperature=2.0) | options
    trainer = EEKDTrainer(student, tiny.settings(folder, **options), teachers=teachers, data_collator=tiny.collate)
    return tiny.check_formula(trainer, teachers, batch)


def batch_of(count=6):
    return tiny.collate([tiny.Texts()[i] for i in range(count)])


@pytest.mark.parametrize(
    "kind, options",
    [
        ("llama", dict(tie_word_embeddings=True)),
        ("qwen2", QWEN),
        ("gemma2", dict(tie_word_embeddings=True, sliding_window=4)),
        ("gemma3", dict(tie_word_embeddings=True)),
        ("opt", dict(word_embed_proj_dim=8)),
        ("mistral", dict(sliding_window=4)),
        ("neox", dict()),
        ("mamba", dict()),
    ],
)
def test_the_loss_is_the_plain_formula(kind, options, tmp_path):
    teachers = [tiny.language_model(kind, 24, seed, **options) for seed in (1, 2)]
    student = tiny.language_model(kind, **options)
    got = check(student, teachers, tmp_path, batch_of())
    if options.get("tie_word_embeddings"):
        assert student.lm_head.weight is student.get_input_embeddings().weight and "lm_head.weight" not in got


def test_a_student_of_another_architecture(tmp_path):
    teachers = [tiny.language_model("llama", 24, 1), tiny.language_model("qwen2", 32, 2, **QWEN)]
    check(tiny.language_model("gpt2"), teachers, tmp_path, batch_of())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma2"])
@pytest.mark.parametrize("form", ["packed", "left", "assistant", "no mask"])
def test_batches_of_every_form(kind, form, tmp_path):
    student, teachers = tiny.language_model(kind), [tiny.language_model(kind, 24, seed) for seed in (1, 2)]
    samples = [tiny.Texts()[i] for i in range(6)]
    if form == "packed":
        batch = dict(transformers.DataCollatorWithFlattening()(samples))
        batch["use_cache"] = False  # with a cache transformers sees one sequence
    elif form == "left":
        batch = {name: x.flip(1) for name, x in batch_of().items()}
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    elif form == "assistant":  # the labels are those of an answer only
        batch = batch_of()
        batch["labels"][:, :2] = -100
    else:
        rows = torch.randint(1, tiny.VOCAB, (4, 9), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": rows, "labels": rows.clone()}
    check(student, teachers, tmp_path, batch)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_models_of_16_bits_are_near_those_of_32(kind, tmp_path):
    """The weights themselves in bfloat16, as most checkpoints are, without autocast."""
    teachers, student = [tiny.language_model(kind, 24, seed) for seed in (1, 2)], tiny.language_model(kind)
    batch, found = batch_of(), []
    for dtype in (torch.float32, torch.bfloat16):
        models = [copy.deepcopy(model).to(dtype) for model in (student, *teachers)]
        options = dict(weighting="attention", temperature=1.0)
        trainer = EEKDTrainer(
            models[0], tiny.settings(tmp_path, **options), teachers=models[1:], data_collator=tiny.collate
        )
        found.append(tiny.loss_of(trainer, batch))
        assert all(g.dtype == dtype for g in found[-1][1].values())
        assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in trainer.criterion.parameters())
    torch.testing.assert_close(found[1][0].float(), found[0][0], rtol=3e-2, atol=1e-2)
    for name, gradient in found[0][1].items():
        assert F.cosine_similarity(gradient.flatten(), found[1][1][name].float().flatten(), 0) > 0.98, name
    run = tiny.save([teacher.to(torch.bfloat16) for teacher in teachers], tmp_path / "run")
    trainer = tiny.trained(tmp_path, student.to(torch.bfloat16), run, max_steps=2)
    assert {p.dtype for model in trainer.teachers.models for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_checkpointing_by_the_settings_changes_nothing(kind, reentrant, tmp_path):
    run, states = tiny.save([tiny.language_model(kind, 24, 1)], tmp_path / "run"), []
    for options in ({}, dict(gradient_checkpointing=True,
                             gradient_checkpointing_kwargs={"use_reentrant": reentrant})):  # fmt: skip
        options |= dict(max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2)
        states.append(tiny.trained(tmp_path, tiny.language_model(kind), run, **options).model.state_dict())
    tiny.compare(*states, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_a_student_with_an_adapter_and_embeddings_of_its_own(tied, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft, of the extra hf")
    student = peft.get_peft_model(
        tiny.language_model("llama", tie_word_embeddings=tied),
        peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], init_lora_weights=False),
    )
    teachers = [tiny.language_model("llama", 24, 1)]
    got = check(student, teachers, tmp_path, batch_of())
    assert any("embed_tokens.modules_to_save" in name for name in got) and any("lora_" in name for name in got)


def test_a_classifier_with_an_adapter_trains_its_own_last_layer(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft, of the extra hf")
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    student = peft.get_peft_model(tiny.classifier("bert"), config)
    run = tiny.save([tiny.classifier("bert", 24, 1)], tmp_path / "run")
    for weighting in ("uniform", "attention"):
        trainer = tiny.trainer_of(student, run, tmp_path, weighting=weighting, data=tiny.Texts(classes=tiny.CLASSES))
        _, got = tiny.loss_of(trainer, tiny.batch_for("bert"))
        assert any("classifier.modules_to_save" in name and g.abs().sum() > 0 for name, g in got.items())
        assert not any("original_module" in name for name in got)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_vocabularies_that_were_resized(kind, tmp_path):
    """To a multiple of 64, as many do: the rows beyond the tokenizer's take no part."""
    student, teacher = tiny.language_model(kind), tiny.language_model(kind, 24, 1)
    teacher.resize_token_embeddings(tiny.VOCAB, pad_to_multiple_of=64, mean_resizing=False)
    student.resize_token_embeddings(tiny.VOCAB + 3, mean_resizing=False)
    assert (len(student.lm_head.weight), len(teacher.lm_head.weight)) == (tiny.VOCAB + 3, 64)
    options = dict(weighting="uniform", temperature=2.0)
    trainer = EEKDTrainer(
        student, tiny.settings(tmp_path, **options), teachers=[teacher], data_collator=tiny.collate,
        train_dataset=tiny.Texts(), processing_class=tiny.tokenizer_of(),
    )  # fmt: skip
    batch = batch_of()
    loss, got = tiny.loss_of(trainer, batch)
    student.zero_grad()
    s, y = tiny.rows_of(student, batch)
    with torch.no_grad():
        z, _ = tiny.rows_of(teacher.eval(), batch)
    n = tiny.VOCAB + 3
    want = tiny.formula(s, [z[:, :n]], y, torch.ones(len(y), 1), 2.0) / len(y)
    want.backward()
    torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=1e-5)
    tiny.compare(got, tiny.gradients(student))
    trainer.train()


@pytest.mark.bad_input
def test_a_label_beyond_the_vocabulary(tmp_path):
    student, teacher = tiny.language_model("llama", vocab=64), tiny.language_model("llama", 24, 1)
    trainer = EEKDTrainer(
        student, tiny.settings(tmp_path, weighting="uniform"), teachers=[teacher], data_collator=tiny.collate,
        processing_class=tiny.tokenizer_of(),
    )  # fmt: skip
    batch = batch_of()
    batch["labels"][0, 1] = tiny.VOCAB + 5
    with pytest.raises(RuntimeError, match="^labels.* is 42, which is neither a class below 37 nor ignore_index"):
        tiny.loss_of(trainer, batch)
