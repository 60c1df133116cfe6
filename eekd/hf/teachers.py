"""M frozen teachers of one run: whole checkpoints, or one base model with M adapters."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from eekd.hf.checkpoints import adapter_config, checkpoint_folders, weights_file
from eekd.hf.heads import ClassifierHead, LanguageHead, named_inputs, only, run
from eekd.io.files import first_line
from eekd.io.state_dicts import some
from eekd.io.tensors import load_weights, weights_sha256
from eekd.snapshots.wrappers import logits_of


class Teachers:
    """M frozen models that run one after another.

        teachers = Teachers.load("teacher-run", snapshots=5)

    Attributes: `names` of the M; `models`, M of them, or one base model that carries M adapters.

    Raises ValueError or FileNotFoundError for missing files or weights, adapters of several base models, prompt
    learning, and models spread over several devices.
    """

    def __init__(self, models: Sequence[nn.Module], names: Sequence[str], adapters: Sequence[str] = ()):
        self.models, self.names, self.adapters = list(models), list(names), list(adapters)
        for model, name in zip(self.models, self.names, strict=bool(not adapters)):
            devices = {str(d) for d in (getattr(model, "hf_device_map", None) or {}).values()}
            if len(devices) > 1:
                raise ValueError(f"{name} must be on one device, got its layers on {some(sorted(devices))}")
            model.eval().requires_grad_(False)

    @classmethod
    def load(
        cls,
        paths: str | Path | Sequence[str | Path],
        snapshots: int | None = None,
        base: nn.Module | str | None = None,
        last: bool = False,
    ) -> "Teachers":
        """The checkpoints of a run, by transformers' own functions, in the dtype that they were saved in.

        `base` is the model that adapters belong to, or its name (None: the one that the adapters name); it is not
        copied. With `last` only the finished model is read.
        """
        folders = checkpoint_folders(paths, snapshots)
        folders = folders[-1:] if last else folders
        kinds = {adapter_config(folder) is not None for folder in folders}
        if kinds == {True}:
            return _adapters(cls, folders, base)
        if kinds != {False}:
            raise ValueError("teacher_checkpoints must be whole models or adapters, got both")
        if base is not None:
            raise ValueError(f"teacher_base must be None with whole models, such as {folders[0]}")
        return cls([_whole(folder) for folder in folders], [str(folder) for folder in folders])

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device) -> "Teachers":
        """Moves all of them."""
        for model in self.models:
            model.to(device)
        return self

    def __iter__(self) -> Iterator[nn.Module]:
        """The teachers, each ready to be called until the next one is asked for."""
        if not self.adapters:
            yield from self.models
        for adapter in self.adapters:
            self.models[0].set_adapter(adapter)  # pyright: ignore[reportCallIssue]
            self.models[0].requires_grad_(False)  # which makes an adapter trainable
            yield self.models[0]

    def language_heads(self) -> list[LanguageHead]:
        """The head of each; one object for all where they share it, or where theirs are equal, as frozen ones are."""
        if self.adapters:
            return [LanguageHead(self.models[0], self.names[0])] * len(self)
        heads = [LanguageHead(model, name) for model, name in zip(self.models, self.names, strict=True)]
        for head in heads[1:]:
            if _equal(head.weight, heads[0].weight) and _equal(head.bias, heads[0].bias):
                head.module.weight, head.module.bias = heads[0].module.weight, heads[0].module.bias
        return heads

    def configs(self) -> list:
        """The configuration of each."""
        return [model.config for model in (self.models * len(self) if self.adapters else self.models)]

    def classifier_heads(self, layer: str | None = None) -> list[ClassifierHead]:
        """The last layer of each classifier, or the one that `layer` names."""
        models = self.models * len(self) if self.adapters else self.models
        each = zip(models, self.names, self.configs(), strict=True)
        return [ClassifierHead(model, name, layer, config.num_labels) for model, name, config in each]

    def verify(self, heads: list[LanguageHead] | list[ClassifierHead], context, *batch) -> None:
        """Compares every head with its model's own logits, see their `verify`."""
        for head, model in zip(heads, self, strict=True):
            with context():
                head.verify(model, *batch)

    @torch.no_grad()
    def hidden_states(self, heads: list[LanguageHead], inputs: dict, select, context) -> list[Tensor]:
        """The last hidden states (N, H_m) of each, at the rows that `select` takes of (B, T, H_m)."""
        states = []
        for name, head, model in zip(self.names, heads, self, strict=True):
            with head.tap() as tapped, context():
                run(model, name, inputs)
            states.append(select(only(tapped, name)))
        return states

    @torch.no_grad()
    def logits_and_features(
        self, heads: list[ClassifierHead] | None, inputs: dict, context
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Each one's logits (N, C) and, where there are heads, features (N, D)."""
        outputs = []
        for m, model in enumerate(self):
            with heads[m].tap() if heads else contextlib.nullcontext([]) as tapped, context():
                logits = logits_of(run(model, self.names[m], inputs))
            outputs.append(heads[m].split(logits, tapped) if heads else (logits.flatten(0, -2), None))
        logits, features = map(list, zip(*outputs, strict=True))
        return logits, features if heads else None

    @property
    def hashes(self) -> list[str]:
        """SHA-256 of each one's weights; [] of models in memory."""
        if not all(Path(name).is_dir() for name in self.names):
            return []
        files = [weights_file(Path(name)) for name in self.names]
        return [weights_sha256(file) for file in files]

    def named_inputs(self) -> list[str]:
        """What their forward takes by name."""
        return named_inputs(self.models[0])


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.shape == b.shape and torch.equal(a, b))


def _whole(folder: str | Path) -> nn.Module:
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} must have the config.json of a model, got {first_line(error)}") from error
    name = (config.architectures or [None])[0]
    kind = getattr(transformers, name or "", None)
    if kind is None:
        raise ValueError(f"{folder} must be of a class of transformers, got {name}: load the models and give teachers=")
    return read_model(kind, folder, config=config)


def read_model(kind: type, folder: str | Path, **options) -> nn.Module:
    """`kind.from_pretrained`, but weights that a checkpoint lacks are an error: they would be made at random."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, report = kind.from_pretrained(folder, dtype="auto", output_loading_info=True, **options)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read as {kind.__name__}: {first_line(error)}") from error
    for trouble in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, report.get(trouble, ()))):
            raise ValueError(f"{folder} must hold all weights of {kind.__name__}, got none that fit for {some(names)}")
    return model


def _adapters(cls, folders: list[Path], base: nn.Module | str | None) -> "Teachers":
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ImportError(f"{folders[0]} holds an adapter, which needs peft: pip install peft") from error
    configs = [adapter_config(folder) or {} for folder in folders]
    bases = {config.get("base_model_name_or_path") for config in configs}
    if len(bases) > 1:
        raise ValueError(f"adapters must be of one base model, got {some(map(str, sorted(bases, key=str)))}")
    for folder, config in zip(folders, configs, strict=True):
        if "num_virtual_tokens" in config or config.get("peft_type") in ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"):
            raise ValueError(f"{folder} must not be of prompt learning, got {config.get('peft_type')}")
    named = bases.pop()
    if isinstance(base, nn.Module):
        own = getattr(base, "name_or_path", "")
        if named and own and Path(str(own)).name != Path(named).name:
            raise ValueError(f"teacher_base must be {named}, which the adapters belong to, got {own}")
    else:
        base = base or named
        if not base:
            raise ValueError(f"teacher_base must be given, for {folders[0]} does not name its base model")
        try:
            base = _whole(base)
        except ValueError as error:
            raise ValueError(f"teacher_base must be the adapters' base model, got {first_line(error)}") from error
    adapters, model = [f"snapshot{m}" for m in range(len(folders))], None
    for folder, adapter in zip(folders, adapters, strict=True):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if model is None:
                    model = PeftModel.from_pretrained(base, folder, adapter_name=adapter)
                else:
                    model.load_adapter(folder, adapter_name=adapter)
        except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
            raise ValueError(f"{folder} must fit its base model as an adapter, got {first_line(error)}") from error
        # peft only warns of what it could not place
        held = set(get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False))
        state = set(load_weights(weights_file(folder)))
        if state != held:
            got = f"also {some(sorted(state - held))}" if state - held else f"none of {some(sorted(held - state))}"
            raise ValueError(f"{folder} must fit its base model as an adapter, got {got}")
    return cls([model], [str(folder) for folder in folders], adapters)
