"""TRL's SFTTrainer with the mixin: its batches, packed and masked as its settings say, teach by the plain formula."""

import dataclasses

import pytest
from tiny import Texts, check_formula, compare, language_model, tokenizer_of

from eekd.hf import EEKDArguments, EEKDMixin

trl = pytest.importorskip("trl", reason="needs trl, of the extra trl")
datasets = pytest.importorskip("datasets", reason="needs datasets, of the extra data")


@dataclasses.dataclass
class Config(EEKDArguments, trl.SFTConfig):
    pass


class SFT(EEKDMixin, trl.SFTTrainer):
    pass


TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + ' ' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
)


def words(row):
    return " ".join(f"t{i}" for i in row)


def data_of(form):
    rows = [row + [7, 8] for row in Texts().rows]  # of at least four words
    if form == "chats":
        chats = [[{"role": "user", "content": words(row[:2])}, {"role": "assistant", "content": words(row[2:])}]
                 for row in rows]  # fmt: skip
        return datasets.Dataset.from_dict({"messages": chats})
    if form == "completions":
        return datasets.Dataset.from_dict(
            {"prompt": [words(row[:2]) + " " for row in rows], "completion": [words(row[2:]) for row in rows]}
        )
    return datasets.Dataset.from_dict({"text": list(map(words, rows))})


def trainer_of(folder, student, teachers, data="texts", *, peft_config=None, **options):
    common = dict(
        max_steps=2, per_device_train_batch_size=8, use_cpu=True, report_to="none", save_strategy="no", max_length=32,
        learning_rate=0.1, optim="sgd", max_grad_norm=0.0, bf16=False, lr_scheduler_type="constant", logging_steps=1,
        weighting="uniform", temperature=2.0, eos_token="t0", gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    tokenizer = tokenizer_of()
    tokenizer.chat_template = TEMPLATE
    return SFT(
        student, Config(str(folder / "sft"), **{**common, **options}), train_dataset=data_of(data), teachers=teachers,
        eval_dataset=data_of(data), processing_class=tokenizer, peft_config=peft_config,
    )  # fmt: skip


def test_an_update_is_the_same_however_it_is_accumulated(tmp_path):
    states, losses = [], []
    for size, steps in ((8, 1), (2, 4)):
        student, teachers = language_model("llama"), [language_model("llama", 24, 1)]
        options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        trainer = trainer_of(tmp_path, student, teachers, **options)
        trainer.train()
        assert "eval_loss" in trainer.evaluate()
        states.append(student.state_dict())
        losses.append(trainer.state.log_history[0]["distillation_loss"])
    compare(*states, rtol=1e-4, atol=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    "data, options",
    [
        ("texts", {}),
        ("texts", {"packing": True, "max_length": 16}),
        ("texts", {"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
        ("texts", {"gradient_checkpointing": True}),
        ("completions", {"completion_only_loss": True}),
        ("chats", {"assistant_only_loss": True}),
    ],
)
def test_its_batches_teach_by_the_plain_formula(data, options, tmp_path):
    student, teachers = language_model("llama"), [language_model("llama", 24, seed) for seed in (1, 2)]
    trainer = trainer_of(tmp_path, student, teachers, data, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    counted = (batch["labels"] != -100).float().mean()
    assert (0.2 < counted < 0.8) if data != "texts" or "packing" not in options else counted > 0.5
    check_formula(trainer, teachers, dict(batch) | {"use_cache": False})
    trainer.train()


def test_an_adapter_is_trained_alone(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft, of the extra hf")
    teachers = [language_model("llama", 24, 1)]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    trainer = trainer_of(tmp_path, language_model("llama"), teachers, peft_config=config)
    batch = next(iter(trainer.get_train_dataloader()))
    got = check_formula(trainer, teachers, dict(batch) | {"use_cache": False})
    assert got and all("lora_" in name for name in got)


@pytest.mark.bad_input
def test_another_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^(loss_type must be nll|compute_loss_func must be None) to distil"):
        trainer_of(tmp_path, language_model("llama"), [language_model("llama", 24, 1)], loss_type="dft")
