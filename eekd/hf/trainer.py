"""A Trainer whose student learns from the checkpoints of another run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.models.auto import modeling_auto

from eekd import parallel
from eekd.hf import checks
from eekd.hf.banks import CLASSIFIER, LANGUAGE_MODEL, TOKEN_CLASSIFIER, Bank, read_manifest
from eekd.hf.checkpoints import checkpoint_folders, spaced
from eekd.hf.classifier_bank import ClassifierBank
from eekd.hf.config import EEKDArguments
from eekd.hf.heads import accepted, body_of, replaced, without_adapters
from eekd.hf.tasks import IGNORED, Classification, LanguageModelling, first_samples, model_inputs
from eekd.hf.teachers import Teachers, read_model
from eekd.hf.token_bank import TokenBank
from eekd.io.tensors import load_state, load_tensors, save_tensors
from eekd.method.losses import EEKDLoss

ATTENTION = "eekd_attention.safetensors"  # beside the model, in every checkpoint
TASKS = [
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", LANGUAGE_MODEL, LanguageModelling, {"shift": True}),
    ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", LANGUAGE_MODEL, LanguageModelling, {"shift": False}),
    ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", CLASSIFIER, Classification, {}),
    ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", TOKEN_CLASSIFIER, Classification, {}),
    ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", CLASSIFIER, Classification, {}),
]


class EEKDMixin(Trainer if TYPE_CHECKING else object):
    """Makes a Trainer whose student learns from M checkpoints. It must come before the Trainer in the list of bases.

        class EEKDTrainer(EEKDMixin, Trainer): ...
        class EEKDSFTTrainer(EEKDMixin, SFTTrainer): ...  # whose args are of a class (EEKDArguments, SFTConfig)

    In training the loss is that of `eekd.EEKDLoss`; language models compute it with `eekd.linear_ensemble_kd`. It is
    the mean over the tokens or samples of a whole update whose label is not -100: over all accumulation steps and, with
    `average_tokens_across_devices`, over all processes. Evaluation is the Trainer's own: its loss is the student's
    cross-entropy, and teachers do not run.

    Args, in addition to the Trainer's:
        teacher_checkpoints: a run's folder, a checkpoint, or a list of checkpoints; None: those of the settings.
        teachers: models in memory, instead of checkpoints.
        teacher_base: the base model of adapters, or its name; None: the one that the adapters name.
        bank: the folder of the teachers' stored outputs, see `write_token_bank` and `write_classifier_bank`. If
            teacher_checkpoints are given too, the bank must be theirs.

    Attributes: `teachers`; `criterion`, an EEKDLoss. With weighting "attention" its parameters are trained with the
    student's, without weight decay and not counted in `max_grad_norm`, and saved in every checkpoint.

    Raises ValueError, FileNotFoundError or TypeError of one sentence for anything that does not fit. On the first batch
    the logits of every head are compared with its model's own.
    """

    args: Any  # these are the Trainer's
    model: Any
    accelerator: Any
    optimizer: Any
    state: Any
    _signature_columns: Any

    def __init__(
        self,
        *args,
        teacher_checkpoints: str | Path | Sequence[str | Path] | None = None,
        teachers: Sequence[nn.Module] | None = None,
        teacher_base: nn.Module | str | None = None,
        bank: str | Path | None = None,
        **named,
    ):
        super().__init__(*args, **named)
        if not issubclass(type(self.args), EEKDArguments):
            raise TypeError(f"args must be an EEKDConfig or have EEKDArguments, got {type(self.args).__name__}")
        checks.check_trainer(self)
        paths = self.args.teacher_checkpoints if teacher_checkpoints is None else teacher_checkpoints
        bank = self.args.bank if bank is None else bank
        sources = {"teacher_checkpoints": paths, "teachers": teachers, "bank": bank}
        given = [name for name, source in sources.items() if source is not None]
        if len(given) != 1 and given != ["teacher_checkpoints", "bank"]:
            got = " and ".join(given) or "none"
            raise ValueError(f"teacher_checkpoints, teachers or bank must be given, got {got}")
        if teacher_base is not None and given != ["teacher_checkpoints"]:
            got = f"a {type(teacher_base).__name__}" if isinstance(teacher_base, nn.Module) else repr(teacher_base)
            raise ValueError(f"teacher_base must be None with {given[-1]}, got {got}")
        _task_of(self.model)
        last = self.args.weighting == "last"
        folders = [] if paths is None else checkpoint_folders(paths, self.args.snapshots)
        if bank is not None:
            kind = TokenBank if read_manifest(bank).kind == LANGUAGE_MODEL else ClassifierBank
            self.teachers = kind(bank, last, self.args.snapshots)
            self.teachers.check(self._eekd_tokenizer(), folders or None, self.train_dataset)
        elif paths is not None:
            checks.check_apart(self.model, [teacher_base] if isinstance(teacher_base, nn.Module) else [])
            checks.check_tokenizers(folders, self._eekd_tokenizer())
            checks.check_processors(folders, self._eekd_tokenizer())
            self.teachers = Teachers.load(folders, base=teacher_base, last=last)
        else:
            models = list(teachers) if isinstance(teachers, Sequence | nn.ModuleList) else []
            if not models or not all(isinstance(model, nn.Module) for model in models):
                raise ValueError(
                    f"teachers must be a list of at least one model, got {repr(teachers)[:100]!r}; teacher_checkpoints "
                    "takes folders"
                )
            places = spaced(len(models), self.args.snapshots)[-1 if last else 0 :]
            models = [models[m] for m in places]
            checks.check_apart(self.model, models)
            self.teachers = Teachers(models, [f"teacher {m + 1}" for m in places])
        self.teachers.to(self.args.device)
        self._eekd_join(self.model)

    def _eekd_join(self, student: nn.Module) -> None:
        """Sets up what depends on the student."""
        args = self.args
        kind, does, task, options = _task_of(student)
        if isinstance(self.teachers, Bank) and self.teachers.manifest.kind != does:
            raise ValueError(f"the student must be a {self.teachers.manifest.kind} for this bank, got a {kind}")
        self.task = task(student, self.teachers, args, self._eekd_tokenizer(), **options)
        temperature = self.task.temperature if args.temperature is None else args.temperature
        with torch.random.fork_rng(devices=[]):  # a student's own randomness is that of a run without attention
            torch.manual_seed(args.seed)
            self.criterion = EEKDLoss(
                args.weighting,
                student_dim=self.task.student_dim,
                snapshot_dim=self.task.snapshot_dim,
                embed_dim=args.embed_dim,
                temperature=temperature,
                alpha=args.alpha,
                fusion=args.fusion,
                attention_objective=args.attention_objective,
            ).to(args.device)
        self._eekd_compile(student)
        # Names of its own begin so, for subclasses of Trainer have many: TRL's have a _tokenizer.
        self._eekd_verified = False
        self._eekd_measured: dict[str, Tensor] = {}
        self._eekd_updates = 0

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        plugin = self.accelerator.state.dynamo_plugin
        self._eekd_dynamo = plugin.to_kwargs() or getattr(self, "_eekd_dynamo", {})
        plugin.backend = DynamoBackend.NO  # it would compile the student with its head, which every step replaces

    def _eekd_compile(self, student: nn.Module) -> None:
        """torch.compile of the student's body, where the settings ask for it."""
        if "backend" not in self._eekd_dynamo:
            return
        if (body := body_of(student)) is None:
            raise ValueError(f"torch_compile must be False for a {type(student).__name__}, whose head is not apart")
        body.compile(**self._eekd_dynamo)

    def _eekd_tokenizer(self):
        return self.processing_class or getattr(self.data_collator, "tokenizer", None)

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        if hasattr(self, "teachers"):
            self._eekd_join(model)
        return model

    # Loss

    def get_batch_samples(self, epoch_iterator, num_batches, *args):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, *args)
        self.criterion.zero_grad()  # an update begins; the Trainer does the model's
        return batches, self._eekd_items(batches) if batches else None

    def _eekd_items(self, batches: list[dict]) -> Tensor:
        """How many labels count in one update: float32, at least 1."""
        for batch in batches:
            if not isinstance(labels := batch.get("labels"), Tensor):
                raise ValueError(f"a batch must have labels, got {', '.join(batch)}")
            if labels.is_floating_point():
                raise ValueError(f"labels must be whole numbers, one for each row, got {labels.dtype}")
        counts = [(self.task.targets(batch) != IGNORED).sum() for batch in batches]
        count = torch.stack(counts).sum().to(self.args.device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count.clamp(min=1).float()

    def training_step(self, model, inputs, num_items_in_batch=None):
        # So that nothing is divided again; transformers 4 asks the second alone, and TRL sets the first.
        self.loss_is_scaled_for_ga = True
        before, self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs, True
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self.model_accepts_loss_kwargs = before
        if self.accelerator.sync_gradients:
            self._eekd_updates += 1
            self._average_attention()
        return loss

    def _average_attention(self) -> None:
        """The mean over processes of the attention's gradients, as DistributedDataParallel takes of the student's."""
        for parameter in self.criterion.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        parallel.all_reduce_mean_(p.grad for p in self.criterion.parameters() if p.grad is not None)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **named):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **named)
        items = self._eekd_items([inputs]) if num_items_in_batch is None else num_items_in_batch
        if not self._eekd_verified:
            self._eekd_verify(inputs)
        student = self.model
        forward, kind = student.forward, self.args.device.type
        with torch.autocast(kind, enabled=False):  # transformers 4 computes a whole loss in one
            taught = self.task.teach(inputs, self.accelerator.autocast)

        def joined(*args, **named):
            # The loss is made inside the student's forward, where DistributedDataParallel sees that the head is used.
            with self.task.tap() as tapped:
                output = forward(*args, **named)
            with torch.autocast(kind, enabled=False):
                loss, measured = self.task.loss(self.criterion, output, tapped, taught, items)
            return {"loss": loss, **measured}

        with replaced(student, joined):
            outputs = model(**accepted(student, model_inputs(inputs)))
        if self.args.average_tokens_across_devices:
            outputs = {name: value * self.accelerator.num_processes for name, value in outputs.items()}
        loss = outputs.pop("loss")
        for name, value in outputs.items():
            self._eekd_measured[name] = self._eekd_measured.get(name, 0) + value
        return (loss, {"loss": loss}) if return_outputs else loss

    def _eekd_verify(self, inputs: dict) -> None:
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        half = self.accelerator.mixed_precision != "no"
        try:
            self.task.verify(first_samples(inputs), self.accelerator.autocast, half)
        finally:
            for module, mode in modes:
                module.training = mode
        self._eekd_verified = True

    def prediction_step(self, model, inputs, *args, **named):
        return super().prediction_step(model, accepted(self.model, inputs), *args, **named)

    def _set_signature_columns_if_needed(self):
        new = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if new and hasattr(self, "teachers"):  # what only the teachers take is kept for them
            others = ["labels", "shift_labels", *self.teachers.named_inputs()]
            self._signature_columns += [name for name in others if name not in self._signature_columns]

    def log(self, logs, *args, **named):
        if self._eekd_measured and "loss" in logs and "learning_rate" in logs:
            values = torch.cat([value.float().reshape(-1) for value in self._eekd_measured.values()])
            values /= max(1, self._eekd_updates)
            loss, attention_loss, *weights = self.accelerator.reduce(values, "mean").tolist()
            logs = {**logs, "distillation_loss": loss}
            if self.criterion.attention is not None:
                logs["attention_loss"] = attention_loss
            logs |= {f"weight_{m}": weight for m, weight in enumerate(weights, 1) if len(weights) > 1}
            self._eekd_measured, self._eekd_updates = {}, 0
        return super().log(logs, *args, **named)

    # The attention's parameters: optimised with the student's, kept beside them

    def create_optimizer(self, *args, **named):
        if self.optimizer is not None and self.lr_scheduler is not None and self._eekd_apart():
            raise ValueError(
                "optimizers must be (None, None) for weighting 'attention', whose parameters join them, got one of "
                "your own: give optimizer_cls_and_kwargs"
            )
        super().create_optimizer(*args, **named)
        if apart := self._eekd_apart():
            self.optimizer.add_param_group({"params": apart, "weight_decay": 0.0})
        return self.optimizer

    def _eekd_apart(self) -> list[nn.Parameter]:
        """The attention's parameters that the optimizer does not have."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        optimised = {id(parameter) for group in groups for parameter in group["params"]}
        return [parameter for parameter in self.criterion.parameters() if id(parameter) not in optimised]

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and self.criterion.attention is not None:
            save_tensors(Path(output_dir or self.args.output_dir) / ATTENTION, self.criterion.state_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self._eekd_load(
            resume_from_checkpoint, lambda: super(EEKDMixin, self)._load_from_checkpoint(resume_from_checkpoint)
        )

    def _load_best_model(self):
        self._eekd_load(self.state.best_model_checkpoint, super()._load_best_model)

    def _eekd_load(self, checkpoint: str, by_trainer) -> None:
        if isinstance(self.model, PreTrainedModel):
            # Of weights that are saved under other names than the model has the Trainer only warns, and goes on with
            # those that are there: transformers 5 does so with a ViT of its own.
            state = read_model(type(self.model), Path(checkpoint)).state_dict()
            self.model.load_state_dict(state)
        else:
            by_trainer()
        self._load_attention(checkpoint)

    def _load_attention(self, checkpoint: str) -> None:
        path, attends = Path(checkpoint) / ATTENTION, self.criterion.attention is not None
        if path.is_file() != attends:
            got = "none" if attends else "one"
            raise ValueError(
                f"weighting must be that of {checkpoint}: {self.args.weighting!r} has {got} of {ATTENTION}"
            )
        if attends:
            load_state(self.criterion, load_tensors(path), path)


def _task_of(student: nn.Module) -> list:
    """The student's class, what it does, and the class and options of its task; ValueError where there is none."""
    kind = type(without_adapters(student)).__name__
    for names, *task in TASKS:
        if kind in _classes(getattr(modeling_auto, names)):
            return [kind, *task]
    raise ValueError(
        "the student must be a causal or masked language model or a classifier of sequences, tokens or images, got a "
        f"{kind}"
    )


def _classes(mapping: dict) -> set[str]:
    """The names of a mapping's classes: some models have more than one."""
    return {name for value in mapping.values() for name in ((value,) if isinstance(value, str) else value)}


class EEKDTrainer(EEKDMixin, Trainer):
    """A Hugging Face Trainer whose student learns from the checkpoints of another run; arguments as in `EEKDMixin`.

    trainer = EEKDTrainer(
        model=student, args=EEKDConfig("student-run", weighting="attention"), teacher_checkpoints="teacher-run",
        train_dataset=tokens, data_collator=collator, processing_class=tokenizer,
    )
    trainer.train()
    """
