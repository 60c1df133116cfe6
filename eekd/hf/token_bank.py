"""What M teachers say of every token of a data set, computed once: students then train without running them.

Beside the files of `eekd.hf.banks`, a row being a token that is no padding:

    rows-0.safetensors …   hidden (rows, M, H), the last hidden states; or of a top-k bank logits (rows, M, K),
                           indices (rows, K), atoms (rows, M, 2, J), see eekd.method.topk
    heads.safetensors      weight.m (V, H) and bias.m (V) of the teachers, of one where all share it; none of top-k
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from eekd.hf.banks import HEADS, LANGUAGE_MODEL, Bank, Writer, batches, known_by, sample_keys, tokens_of
from eekd.hf.heads import LanguageHead, StoredHead
from eekd.hf.teachers import Teachers
from eekd.io.tensors import load_tensors
from eekd.method.topk import TopKLogits, top_k_logits

PROJECTED = 64 << 20  # logits at once, of all snapshots


@torch.no_grad()
def write_token_bank(
    folder: str | Path,
    teachers: Teachers | str | Path | Sequence[str | Path],
    dataset,
    data_collator: Callable,
    *,
    processing_class=None,
    top_k: int = 0,
    dtype: str = "float16",
    batch_size: int = 8,
    device: str | torch.device = "cpu",
) -> "TokenBank":
    """Runs the teachers over the sequences of a dataset and stores their outputs for each token.

        bank = write_token_bank("bank", "teacher-run", train_dataset, collator)

    `teachers` are Teachers, or the checkpoints that `Teachers.load` takes.
    Without `top_k` it stores the last hidden states, 2 H M bytes per token (4 H M in float32), and the heads. They are
    exact, up to `dtype`, at any temperature. With `top_k` K it stores the logits of the K likeliest tokens, the next
    token always among them, and a summary of the others (`eekd.top_k_logits`): (2 K + 48) M + 4 K bytes per token.
    `processing_class` is the tokenizer. If it is given, a trainer must have an equal one.

    Raises ValueError for other dtypes, a K that is not from 0 to V, batches without `input_ids`, values out of the
    range of `dtype`, hidden states whose logits are scaled or soft-capped in several ways, and what
    `LanguageHead.verify` raises; FileExistsError if the folder holds a bank.
    """
    writer = Writer(folder, dtype)
    teachers = (teachers if isinstance(teachers, Teachers) else Teachers.load(teachers)).to(device)
    heads = teachers.language_heads()
    classes = min(len(head.weight) for head in heads)
    widths, names = {head.weight.shape[1] for head in heads}, []
    if not isinstance(top_k, int) or not 0 <= top_k <= classes:
        raise ValueError(f"top_k must be from 0 to {classes}, the number of tokens, got {top_k!r}")
    if len(widths) > 1:
        raise ValueError(f"teachers must have one width for a bank, got {sorted(widths)}")
    for number, batch in enumerate(batches(teachers, dataset, data_collator, batch_size, device)):
        ids, mask = tokens_of(batch)
        if number == 0:
            names = known_by(teachers, batch)
            rows = mask.flatten().nonzero()[:64, 0]
            teachers.verify(heads, torch.no_grad, batch, rows, next(iter(teachers)).dtype != torch.float32)
            for name in ("scale", "softcap"):
                if len({getattr(head, name) for head in heads}) > 1 and not top_k:
                    raise ValueError(
                        f"teachers must have one logit {name} for a bank of hidden states, got "
                        f"{', '.join(str(getattr(head, name)) for head in heads)}: set top_k to store logits"
                    )
        states = teachers.hidden_states(heads, batch, lambda hidden, mask=mask: hidden[mask], torch.no_grad)
        if top_k:
            following = ids.roll(-1, 1).masked_fill(~(mask & mask.roll(-1, 1)), -1)[mask]
            outputs = _top_k(writer, states, heads, following, top_k, classes)
        else:
            outputs = {"hidden": writer.cast("hidden states", torch.stack(states, 1))}
        writer.add(sample_keys(batch, names), mask.sum(1).tolist(), outputs)
    stored = None
    if not top_k:
        own = heads[:1] if all(head.weight is heads[0].weight for head in heads) else heads
        stored = {f"weight.{m}": head.weight for m, head in enumerate(own)}
        stored |= {f"bias.{m}": head.bias for m, head in enumerate(own) if head.bias is not None}
    writer.end(
        stored, teachers, processing_class, kind=LANGUAGE_MODEL, classes=classes, width=widths.pop(),
        inputs=names, top_k=top_k, scale=heads[0].scale, softcap=heads[0].softcap,
    )  # fmt: skip
    return TokenBank(folder)


class TokenBank(Bank):
    """A finished bank of `write_token_bank`. `EEKDTrainer(..., bank="bank")` reads it instead of running teachers.

    Attributes: `manifest`; `names` of the snapshots; `len(bank)` is M.

    Raises FileNotFoundError or ValueError if a file is missing, was changed, or has another format.
    """

    @property
    def keeps_top_k(self) -> bool:
        """Whether logits at K tokens are stored, and no hidden states."""
        return self.manifest.top_k > 0

    def language_heads(self) -> list[StoredHead]:
        """The teachers' heads; of a top-k bank one without weights for each."""
        manifest = self.manifest
        if self.keeps_top_k:
            empty = torch.empty(manifest.classes, 0, device=self.device)
            return [StoredHead(name, empty, None, manifest.scale, manifest.softcap) for name in self.names]
        stored = load_tensors(self.folder / HEADS, manifest.files[HEADS])
        stored = {name: x.to(self.device) for name, x in stored.items()}
        heads = []
        for m, name in zip(self.snapshots, self.names, strict=True):
            number = m if f"weight.{m}" in stored else 0
            weight, bias = stored[f"weight.{number}"], stored.get(f"bias.{number}")
            heads.append(StoredHead(name, weight, bias, manifest.scale, manifest.softcap))
        return heads

    def hidden_states(self, heads, inputs: dict, select, context) -> list[Tensor]:
        """As of `Teachers`."""
        rows = self._rows(inputs, ["hidden"], select)["hidden"]
        return [rows[:, m] for m in self.snapshots]

    def top_k(self, inputs: dict, select) -> TopKLogits:
        """What a top-k bank keeps of the rows that `select` takes."""
        rows = self._rows(inputs, ["logits", "indices", "atoms"], select)
        logits, atoms = (rows[name].transpose(0, 1)[self.snapshots] for name in ("logits", "atoms"))
        return TopKLogits(logits, rows["indices"].long(), atoms, self.manifest.classes)

    def _rows(self, inputs: dict, names: list[str], select) -> dict[str, Tensor]:
        padded = self.rows(inputs, names, tokens_of(inputs)[1])
        return {name: select(x.flatten(2)).unflatten(-1, x.shape[2:]) for name, x in padded.items()}


def _top_k(
    writer: Writer, states: list[Tensor], heads: list[LanguageHead], following: Tensor, top_k: int, classes: int
) -> dict[str, Tensor]:
    """What is stored of N tokens, on the CPU."""
    parts, size = [], max(1, PROJECTED // (4 * classes * len(states)))
    for start in range(0, len(following), size):
        part = slice(start, start + size)
        z = torch.stack([head.project(u[part], classes) for head, u in zip(heads, states, strict=True)])
        kept = top_k_logits(z, top_k, following[part])
        logits = writer.cast("logits", kept.logits.transpose(0, 1))
        parts.append((logits, kept.indices.int().cpu(), kept.atoms.transpose(0, 1).cpu()))
    return {
        name: torch.cat(x) for name, x in zip(("logits", "indices", "atoms"), zip(*parts, strict=True), strict=True)
    }
