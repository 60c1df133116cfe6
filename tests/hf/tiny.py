"""Tiny models with random weights, data for them, trainers, and the plain formula; nothing is downloaded."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

transformers = pytest.importorskip("transformers", reason="needs transformers, of the extra hf")
transformers.utils.logging.disable_progress_bar()
pytest.importorskip("accelerate", reason="needs accelerate, of the extra hf")

from eekd.hf import EEKDConfig, EEKDTrainer  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
VOCAB, LENGTH, CLASSES = 37, 10, 3
SMALL = {
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel,
             dict(n_positions=32, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, dict()),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM,
               dict(head_dim=4, query_pre_attn_scalar=4, final_logit_softcapping=2.0)),
    "cohere": (transformers.CohereConfig, transformers.CohereForCausalLM, dict(logit_scale=0.25)),
    "granite": (transformers.GraniteConfig, transformers.GraniteForCausalLM, dict(logits_scaling=4.0)),
    "phi": (transformers.PhiConfig, transformers.PhiForCausalLM,  # a head with a bias
            dict(resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0)),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, dict()),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, dict()),
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM,
               dict(head_dim=4, query_pre_attn_scalar=4)),
    "opt": (transformers.OPTConfig, transformers.OPTForCausalLM, dict(dropout=0.0, ffn_dim=16)),
    "neox": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM, dict()),
    "griffin": (transformers.RecurrentGemmaConfig, transformers.RecurrentGemmaForCausalLM,
                dict(logits_soft_cap=2.0, block_types=["attention"])),
    "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM, dict(state_size=4)),
    "bert": (transformers.BertConfig, transformers.BertForMaskedLM,
             dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
}  # fmt: skip


def language_model(kind="gpt2", width=16, seed=0, vocab=VOCAB, **options):
    torch.manual_seed(seed)
    config, model, own = SMALL[kind]
    sizes = dict(n_embd=width) if kind == "gpt2" else dict(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    made = model(
        config(vocab_size=vocab, bos_token_id=0, eos_token_id=0, pad_token_id=0, **{**sizes, **own, **options})
    )
    with torch.no_grad():
        for parameter in made.parameters():  # so that predictions differ, and biases are not zero
            parameter += 0.3 * torch.randn_like(parameter)
    return made


class Texts(Dataset):
    """Sequences of unequal lengths."""

    def __init__(self, count=16, seed=0, vocab=VOCAB, classes=None):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(2, LENGTH + 1, (count,), generator=generator).tolist()
        self.rows = [torch.randint(1, vocab, (n,), generator=generator).tolist() for n in lengths]
        self.classes = classes

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return {"input_ids": row} if self.classes is None else {"input_ids": row, "labels": sum(row) % self.classes}


def collate(samples):
    """Padded on the right; labels of padding, and of every fifth token, are -100; or one label a sample."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    rows = [sample["input_ids"] + [0] * (longest - len(sample["input_ids"])) for sample in samples]
    ids = torch.tensor(rows)
    mask = torch.tensor([[i < len(sample["input_ids"]) for i in range(longest)] for sample in samples]).long()
    if "labels" in samples[0]:
        labels = torch.tensor([sample["labels"] for sample in samples])
    else:
        labels = ids.masked_fill(mask == 0, -100).masked_fill(ids % 5 == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def save(models, folder):
    """The folders of a run whose checkpoints the models are."""
    for m, model in enumerate(models, 1):
        model.save_pretrained(folder / f"checkpoint-{m * 5}")
    return folder


def settings(folder, **options):
    common = dict(
        per_device_train_batch_size=8, max_steps=1, learning_rate=0.1, optim="sgd", max_grad_norm=0.0, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant", temperature=1.0,
    )  # fmt: skip
    return EEKDConfig(str(folder / "student-run"), **{**common, **options})


def trainer_of(
    student, run, folder, data=None, callbacks=None, collator=collate, teacher_base=None, eval_dataset=None, **options
):
    return EEKDTrainer(
        model=student,
        args=settings(folder, **options),
        teacher_checkpoints=run,
        train_dataset=Texts() if data is None else data,
        data_collator=collator,
        callbacks=callbacks,
        eval_dataset=eval_dataset,
        teacher_base=teacher_base,
    )


def rows_of(model, batch, shift=True):
    """Logits (N, C) and labels (N) of what counts in a batch, by the model's own forward.

    Without its cache, through which RecurrentGemma of transformers 4.57 passes no gradient.
    """
    inputs = ({"use_cache": False} if shift else {}) | {k: v for k, v in batch.items() if k != "labels"}
    logits = model(**inputs).logits
    labels = batch["labels"]
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    kept = labels != -100
    return logits[kept].float(), labels[kept]


def formula(s, z, y, weights, temperature=1.0, alpha=0.5, fusion="probability"):
    """L of the rows, summed: s (N, C), z M times (N, C), y (N), weights (N, M)."""
    if fusion == "probability":
        p = sum(w[:, None] * (x / temperature).softmax(1) for w, x in zip(weights.T, z, strict=True))
    else:
        p = (sum(w[:, None] * x for w, x in zip(weights.T, z, strict=True)) / temperature).softmax(1)
    kl = (torch.special.xlogy(p, p) - p * (s / temperature).log_softmax(1)).sum()
    return alpha * F.cross_entropy(s, y, reduction="sum") + (1 - alpha) * temperature**2 * kl


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(got, want, rtol=2e-4, atol=2e-6):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def loss_of(trainer, batch, items=None):
    """Loss and gradients of a batch, by the trainer."""
    trainer.model.zero_grad()
    trainer.criterion.zero_grad()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
    loss.backward()
    return loss.detach(), gradients(trainer.model)


def check_formula(trainer, teachers, batch, temperature=2.0):
    """Loss and gradients of a batch are those of the formula, with the models' own logits; the gradients."""
    loss, got = loss_of(trainer, batch)
    student = trainer.model
    student.zero_grad()
    s, y = rows_of(student, batch)
    with torch.no_grad():
        z = [rows_of(teacher.eval(), batch)[0] for teacher in teachers]
    want = formula(s, z, y, torch.full((len(y), len(z)), 1 / len(z)), temperature) / len(y)
    want.backward()
    torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=1e-5)
    compare(got, gradients(student))
    return got


def classifier(kind, width=16, seed=0, **options):
    """Of sequences, of tokens or of images."""
    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2, num_labels=CLASSES,
    )  # fmt: skip
    text = dict(vocab_size=VOCAB, pad_token_id=0, max_position_embeddings=40)
    image = dict(image_size=8, patch_size=4, num_channels=1)
    dropouts = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    gpt2 = dict(
        n_positions=32, n_layer=1, n_head=2, n_embd=width, vocab_size=VOCAB, pad_token_id=0, num_labels=CLASSES,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    name, config = {
        "gpt2": ("GPT2ForSequenceClassification", gpt2),
        "llama": ("LlamaForSequenceClassification", sizes | text | dict(num_key_value_heads=2)),
        "roberta": ("RobertaForSequenceClassification", sizes | text | dropouts),
        "bert": ("BertForSequenceClassification", sizes | text | dropouts),
        "boxes": ("LayoutLMForSequenceClassification", sizes | text | dropouts),
        "tokens": ("BertForTokenClassification", sizes | text | dropouts),
        "vit": ("ViTForImageClassification", sizes | image | dropouts),
        "deit": ("DeiTForImageClassificationWithTeacher", sizes | image | dropouts),
    }[kind]
    model = getattr(transformers, name)
    return model(model.config_class(**config | options))


def batch_for(kind, count=6):
    if kind in ("vit", "deit"):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(count, 1, 8, 8, generator=generator)
        return {"pixel_values": images, "labels": torch.randint(CLASSES, (count,), generator=generator)}
    batch = collate([Texts(classes=CLASSES)[i] for i in range(count)])
    if kind == "tokens":
        batch["labels"] = (batch["input_ids"] % CLASSES).masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def trained(folder, student, run, **options):
    """The student's weights after a training, and what was logged."""
    trainer = trainer_of(student, run, folder, **options)
    trainer.train()
    return trainer


def model_of(kind, width=16, seed=0):
    return (language_model if kind in SMALL else classifier)(kind, width, seed)


def run_of(kind, folder):
    models = [model_of(kind, 24, s) for s in (1, 2)]
    return save(models, folder / "run")


class Images(Dataset):
    def __init__(self):
        self.batch = batch_for("vit", 16)

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {name: values[index] for name, values in self.batch.items()}


def data_for(kind):
    return (Images(), transformers.default_data_collator) if kind == "vit" else (Texts(), collate)


def tokenizer_of(vocab=VOCAB, swapped=False):
    """A tokenizer of words t0, t1, ...; `swapped` gives the last two each other's id."""
    tokenizers = pytest.importorskip("tokenizers")
    ids = {f"t{i}": i for i in range(vocab)}
    if swapped:
        ids |= {f"t{vocab - 1}": vocab - 2, f"t{vocab - 2}": vocab - 1}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="t0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", pad_token="t0", eos_token="t0")


def lora_run(folder, base, count=2, **options):
    """The folders of a run that trained an adapter; the models with each merged, for comparison."""
    peft = pytest.importorskip("peft", reason="needs peft, of the extra hf")
    base.save_pretrained(folder / "base")
    merged = []
    for m in range(1, count + 1):
        model = peft.get_peft_model(
            type(base).from_pretrained(folder / "base"), peft.LoraConfig(r=2, lora_alpha=4, **options)
        )
        torch.manual_seed(m)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) / 2)
        model.save_pretrained(folder / "run" / f"checkpoint-{m}")
        merged.append(model.merge_and_unload().eval())
    return folder / "run", merged


def refused(match, student=None, run=None, folder=None, error=ValueError, **options):
    with pytest.raises(error, match=match) as found:
        trainer_of(student or language_model(), run, folder, **options)
    assert "\n" not in str(found.value)
