"""EEKDTrainer accumulates, logs, saves, resumes and evaluates as its base does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers

from eekd.hf import EEKDConfig, EEKDTrainer
from eekd.io.tensors import load_tensors, save_tensors


def after_updates(folder, kind, weighting, size, steps, **options):
    """Weights and what was logged after two updates of 8 samples, in `steps` parts of each process."""
    data, collator = tiny.data_for(kind)
    trainer = tiny.trained(
        folder, tiny.model_of(kind), folder / "run", data=data, collator=collator, weighting=weighting, max_steps=2,
        logging_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **options,
    )  # fmt: skip
    names = ["loss", "distillation_loss", "weight_1", "weight_2"]
    logged = {f"{name} {i}": torch.tensor(trainer.state.log_history[i][name]) for name in names for i in range(2)}
    return {**trainer.model.state_dict(), **trainer.criterion.state_dict(), **logged}


@pytest.mark.parametrize("kind", ["gpt2", "vit"])
@pytest.mark.parametrize("weighting", ["uniform", "attention"])
def test_an_update_is_the_same_however_it_is_accumulated(kind, weighting, tmp_path):
    tiny.run_of(kind, tmp_path)
    states = [after_updates(tmp_path, kind, weighting, *parts) for parts in ((8, 1), (2, 4), (1, 8))]
    for state in states[1:]:
        tiny.compare(state, states[0], rtol=1e-4, atol=1e-5)
    before = tiny.model_of(kind).state_dict()
    assert any(not torch.equal(before[name], states[0][name]) for name in before)


def test_a_trainer_that_would_divide_by_the_parts_does_not(tmp_path):
    """As a Trainer of transformers 5 does whose own loss is a mean of each part."""
    run, states = tiny.run_of("gpt2", tmp_path), []

    class Mean(EEKDTrainer):
        def __init__(self, *args, **named):
            super().__init__(*args, **named)
            self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = False

    for size, steps in ((8, 1), (2, 4)):
        args = tiny.settings(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        trainer = Mean(
            tiny.language_model(), args, teacher_checkpoints=run, train_dataset=tiny.Texts(), data_collator=tiny.collate
        )
        trainer.train()
        states.append(trainer.model.state_dict())
    tiny.compare(*states, rtol=1e-4, atol=1e-5)


def test_the_attentions_gradients_are_those_of_one_update(tmp_path):
    """The Trainer clears the model's alone."""
    found = []

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **named):
            states = [{k: x.clone() for k, x in m.state_dict().items()} for m in (trainer.model, trainer.criterion)]
            found.append((*states, tiny.gradients(trainer.criterion)))

    batch = tiny.collate([tiny.Texts()[i] for i in range(6)])
    run = tiny.run_of("gpt2", tmp_path)
    options = dict(data=[0] * 6, collator=lambda rows: batch, callbacks=[Look()], max_steps=3)
    trainer = tiny.trainer_of(tiny.language_model(), run, tmp_path, **options)
    trainer.train()
    assert len(found) == 3
    again = tiny.trainer_of(tiny.language_model(), run, tmp_path)
    for model, criterion, want in found:
        again.model.load_state_dict(model)
        again.criterion.load_state_dict(criterion)
        tiny.loss_of(again, batch)
        tiny.compare(tiny.gradients(again.criterion), want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "kind, weighting", [("gpt2", "attention"), pytest.param("vit", "attention", marks=pytest.mark.full)]
)
def test_two_processes_make_the_update_of_one(kind, weighting, tmp_path):
    tiny.run_of(kind, tmp_path)
    want = after_updates(tmp_path, kind, weighting, 8, 1)
    command = [*tiny.TORCHRUN, "--nproc-per-node", "2", __file__, tmp_path, kind, weighting]
    done = subprocess.run([*map(str, command)], env=tiny.ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    states = [load_tensors(tmp_path / f"process-{rank}.safetensors") for rank in range(2)]
    weights = {name for name in want if "." in name}
    tiny.compare(*({name: state[name] for name in weights} for state in states), rtol=0, atol=0)
    tiny.compare(states[0], want, rtol=1e-4, atol=1e-5)


def of_an_epoch(folder, **options):
    """The batches of every update of an epoch whose last update and last batch are short; and the weights after it."""
    trainer = tiny.trainer_of(
        tiny.language_model(), folder / "run", folder, data=tiny.Texts(13), weighting="uniform", max_steps=-1,
        num_train_epochs=1, per_device_train_batch_size=2, gradient_accumulation_steps=3, **options,
    )  # fmt: skip
    updates, own = [], trainer.get_batch_samples

    def get_batch_samples(*args):
        batches, items = own(*args)
        if batches:
            updates.append([{name: x.tolist() for name, x in batch.items()} for batch in batches])
        return batches, items

    trainer.get_batch_samples = get_batch_samples
    trainer.train()
    return updates, trainer.model.state_dict()


@pytest.mark.parametrize("processes", [1, 2])
def test_every_update_is_the_plain_formula(processes, tmp_path):
    tiny.run_of("gpt2", tmp_path)
    if processes == 1:
        updates, got = of_an_epoch(tmp_path)
        assert [len(batches) for batches in updates] == [3, 3, 1] and len(updates[-1][0]["labels"]) == 1
    else:
        command = [*tiny.TORCHRUN, "--nproc-per-node", "2", __file__, tmp_path, "epoch"]
        done = subprocess.run([*map(str, command)], env=tiny.ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        each = [json.loads((tmp_path / f"batches-{rank}.json").read_text()) for rank in range(2)]
        updates, got = [a + b for a, b in zip(*each, strict=True)], load_tensors(tmp_path / "process-0.safetensors")
        assert [len(batches) for batches in updates] == [6, 2]

    student, teachers = tiny.language_model().train(), [tiny.language_model("gpt2", 24, seed).eval() for seed in (1, 2)]
    for batches in updates:
        loss, items = 0, 0
        for batch in batches:
            batch = {name: torch.tensor(x) for name, x in batch.items()}
            s, y = tiny.rows_of(student, batch)
            with torch.no_grad():
                z = [tiny.rows_of(teacher, batch)[0] for teacher in teachers]
            loss, items = loss + tiny.formula(s, z, y, torch.full((len(y), 2), 0.5)), items + len(y)
        student.zero_grad()
        (loss / items).backward()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= 0.1 * parameter.grad
    tiny.compare(got, student.state_dict(), rtol=1e-4, atol=1e-5)


def process():
    """One of two processes of the tests above."""
    folder, (kind, *weighting) = Path(sys.argv[1]), sys.argv[2:]
    if kind == "epoch":
        updates, state = of_an_epoch(folder, ddp_backend="gloo")
        rank = torch.distributed.get_rank()
        (folder / f"batches-{rank}.json").write_text(json.dumps(updates))
        save_tensors(folder / f"process-{rank}.safetensors", state)
        return
    [weighting] = weighting
    state = after_updates(folder, kind, weighting, 2, 2, ddp_backend="gloo")
    save_tensors(folder / f"process-{torch.distributed.get_rank()}.safetensors", state)


def test_the_log_says_what_the_teachers_did(tmp_path):
    trainer = tiny.trained(tmp_path, tiny.language_model(), tiny.run_of("gpt2", tmp_path), max_steps=3, logging_steps=1)
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(entry["distillation_loss"] + entry["attention_loss"], rel=1e-5)
    assert entry["weight_1"] + entry["weight_2"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "vit"])
def test_a_resumed_run_goes_on_to_the_same_bits(kind, tmp_path):
    run, data, collator = tiny.run_of(kind, tmp_path), *tiny.data_for(kind)
    dropout = dict(resid_pdrop=0.2) if kind == "gpt2" else dict(hidden_dropout_prob=0.2)

    def student():
        return tiny.language_model(**dropout) if kind == "gpt2" else tiny.classifier(kind, **dropout)

    options = dict(
        data=data, collator=collator, max_steps=6, save_strategy="steps", save_steps=2, optim="adamw_torch",
        per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=0.01,
    )  # fmt: skip
    whole = tiny.trained(tmp_path, student(), run, **options)
    middle = tmp_path / "student-run" / "checkpoint-4"
    assert (middle / "eekd_attention.safetensors").is_file()
    trainer = tiny.trainer_of(student(), run, tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(middle))
    for module in ("model", "criterion"):
        states = [getattr(t, module).state_dict() for t in (whole, trainer)]
        tiny.compare(*states, rtol=0, atol=0)
    assert trainer.state.global_step == 6

    (middle / "eekd_attention.safetensors").rename(middle / "gone")
    trainer = tiny.trainer_of(student(), run, tmp_path, **options)
    with pytest.raises(ValueError, match="weighting must be that of .*checkpoint-4"):
        trainer.train(resume_from_checkpoint=str(middle))


def test_the_attention_learns_without_weight_decay(tmp_path):
    trainer = tiny.trained(
        tmp_path, tiny.language_model(), tiny.run_of("gpt2", tmp_path), max_steps=2, optim="adamw_torch"
    )
    fresh = tiny.trainer_of(tiny.language_model(), tmp_path / "run", tmp_path).criterion
    for parameter, before in zip(trainer.criterion.parameters(), fresh.parameters(), strict=True):
        assert not torch.equal(parameter, before)
    groups = [g for g in trainer.optimizer.param_groups if any(p is trainer.criterion.attention.student.weight
                                                               for p in g["params"])]  # fmt: skip
    assert len(groups) == 1 and groups[0]["weight_decay"] == 0


def test_saved_students_load_as_any_model(tmp_path):
    trainer = tiny.trained(tmp_path, tiny.language_model(), tiny.run_of("gpt2", tmp_path), max_steps=1)
    trainer.save_model(str(tmp_path / "out"))
    model, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tiny.compare(model.state_dict(), trainer.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["gpt2", "vit"])
def test_evaluation_is_that_of_a_plain_trainer(kind, tmp_path):
    data, collator = tiny.data_for(kind)
    student = tiny.model_of(kind)
    trainer = tiny.trainer_of(student, tiny.run_of(kind, tmp_path), tmp_path, data=data, collator=collator)
    plain = transformers.Trainer(
        student,
        transformers.TrainingArguments(str(tmp_path / "plain"), use_cpu=True, report_to="none"),
        data_collator=collator,
    )
    got, want = (t.predict(data) for t in (trainer, plain))
    assert got.metrics["test_loss"] == pytest.approx(want.metrics["test_loss"], rel=1e-6)
    torch.testing.assert_close(torch.tensor(got.predictions), torch.tensor(want.predictions))
    trainer.args.prediction_loss_only = True
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(want.metrics["test_loss"], rel=1e-6)


def test_activation_checkpoints_change_nothing(tmp_path):
    run, states = tiny.save([tiny.language_model("llama", 24, 1)], tmp_path / "run"), []
    for option in (False, True):
        student = tiny.language_model("llama")
        if option:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        states.append(tiny.trained(tmp_path, student, run, max_steps=2).model.state_dict())
    tiny.compare(*states, rtol=1e-5, atol=1e-6)


def test_the_best_model_comes_back_with_its_attention(tmp_path):
    options = dict(
        max_steps=4, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, learning_rate=0.5,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer = tiny.trainer_of(
        tiny.language_model(), tiny.run_of("gpt2", tmp_path), tmp_path, eval_dataset=tiny.Texts(4, 9), **options
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"
    tiny.compare(trainer.criterion.state_dict(), load_tensors(best / "eekd_attention.safetensors"), rtol=0, atol=0)
    saved = transformers.GPT2LMHeadModel.from_pretrained(best)
    tiny.compare(trainer.model.state_dict(), saved.state_dict(), rtol=0, atol=0)


def test_a_student_that_is_made_anew_gets_an_attention_of_its_own(tmp_path):
    trainer = EEKDTrainer(
        model_init=lambda: tiny.language_model(), args=tiny.settings(tmp_path, max_steps=2), train_dataset=tiny.Texts(),
        teacher_checkpoints=tiny.run_of("gpt2", tmp_path), data_collator=tiny.collate,
    )  # fmt: skip
    first = trainer.model, trainer.criterion
    trainer.train()
    assert trainer.model is not first[0] and trainer.criterion is not first[1]
    assert trainer.task.head.module is trainer.model.lm_head
    for now, fresh in zip(trainer.criterion.parameters(), first[1].parameters(), strict=True):
        assert not torch.equal(now, fresh)


def test_an_optimizer_of_ones_own(tmp_path):
    run, student = tiny.run_of("gpt2", tmp_path), tiny.language_model()
    options = dict(
        args=tiny.settings(tmp_path), teacher_checkpoints=run, train_dataset=tiny.Texts(), data_collator=tiny.collate
    )
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    trainer = EEKDTrainer(student, optimizers=(optimizer, None), **options)
    before = trainer.criterion.attention.student.weight.clone()
    trainer.train()
    assert not torch.equal(before, trainer.criterion.attention.student.weight)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = EEKDTrainer(student, optimizers=(optimizer, schedule), **options)
    with pytest.raises(ValueError, match="optimizers must be"):
        trainer.train()


@pytest.mark.parametrize("kind", ["gpt2", "roberta", "vit"])
def test_a_compiled_student_learns_the_same(kind, tmp_path):
    run, (data, collator) = tiny.run_of(kind, tmp_path), tiny.data_for(kind)
    data = tiny.Texts(classes=tiny.CLASSES) if kind == "roberta" else data
    states, counted = [], torch._dynamo.utils.counters
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        torch._dynamo.reset()
        counted.clear()
        student = tiny.model_of(kind)
        options |= dict(data=data, collator=collator, max_steps=6, per_device_train_batch_size=4, eval_dataset=data)
        trainer = tiny.trained(tmp_path, student, run, **options)
        assert trainer.evaluate()["eval_loss"] > 0
        states.append({**trainer.model.state_dict(), **trainer.criterion.state_dict()})
        assert bool(counted["frames"]["ok"]) is ("torch_compile" in options)
    tiny.compare(states[1], states[0], rtol=1e-4, atol=1e-5)
    assert counted["stats"]["unique_graphs"] <= 8  # not one for each step


def test_the_settings_are_read_from_a_command_line(tmp_path):
    flags = f"--output_dir {tmp_path} --weighting uniform --temperature 2 --alpha 0.3 --teacher_checkpoints runs"
    (args,) = transformers.HfArgumentParser(EEKDConfig).parse_args_into_dataclasses(flags.split())
    assert (args.weighting, args.temperature, args.alpha, args.snapshots) == ("uniform", 2.0, 0.3, None)


if __name__ == "__main__":
    process()
