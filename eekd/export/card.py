"""README.md of an exported student, made from its config.json alone."""

import json

from eekd.io.files import printable

CARD = """\
---
library_name: eekd
pipeline_tag: image-classification
tags: [knowledge-distillation, eekd]
---

# {model}, a student of {method}

It tells {count} classes apart ({some}) in images of {size} x {size} pixels, {colour}.

```python
import eekd

student = eekd.load_student("path/to/this/folder")
print(student.predict("image.png", top=3))
```

`model.pt2` (`torch.export.load("model.pt2").module()`) and `model.onnx`, where they are here, need no eekd: they
take float32 images (B, {channels}, {size}, {size}) and give logits. Make them so: take the centred square of
{zoom:g} times the shorter side, resize it by {interpolation} interpolation, scale it to [0, 1], subtract mean
{mean} and divide by std {std}.

## How good it is

{table}

Trained on `{data}`, {epochs} epochs, seed {seed}. {teacher}

## Where it comes from

```json
{provenance}
```
"""


def card(facts: dict) -> str:
    """The Markdown of a student's card; every number comes from `facts`, the content of config.json."""
    data, provenance = facts["preprocessing"], facts.get("provenance") or {}
    names, teacher = facts["classes"], provenance.get("teacher")
    some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    taught = "Nobody taught it." if not teacher else (
        f"It was taught by {len(teacher['snapshots'])} snapshots of a {teacher['model']['name']}."
    )  # fmt: skip
    return CARD.format(
        model=_plain(facts["model"]["name"]),
        method=_plain(provenance.get("method", "an unknown method")),
        count=len(names),
        some=_plain(some),
        size=data["image_size"],
        colour="grey" if data["channels"] == 1 else "in colour",
        channels=data["channels"],
        zoom=data["zoom"],
        interpolation=data.get("interpolation", "bilinear"),
        mean=[round(x, 4) for x in data["mean"]],
        std=[round(x, 4) for x in data["std"]],
        table=_table(facts.get("results") or {}),
        data=_plain(provenance.get("data", "unknown data")),
        epochs=provenance.get("epochs", "?"),
        seed=provenance.get("seed", "?"),
        teacher=_plain(taught),
        provenance=json.dumps(provenance, indent=1),
    )


def _table(results: dict) -> str:
    lines = ["| network | parameters | validation accuracy | test accuracy |", "|---|--:|--:|--:|"]
    for row in results.get("run") or []:
        numbers = f"{row['parameters']:,} | {row['val_accuracy']:.2%} | {row['test_accuracy']:.2%}"
        lines.append(f"| {_plain(row['name'])} ({_plain(row['model'])}) | {numbers} |")
    if len(lines) == 2 and "test" in results:
        lines.append(f"| this student | | {results['val']['accuracy']:.2%} | {results['test']['accuracy']:.2%} |")
    return "\n".join(lines) if len(lines) > 2 else "Nothing was measured."


def _plain(text) -> str:
    """Text in which nothing is Markdown or HTML: names come from folders."""
    text = printable(text)
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in text)
