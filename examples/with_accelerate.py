"""A student in a loop by accelerate.

    pip install accelerate
    accelerate launch examples/with_accelerate.py

What `prepare` wraps is called, and nothing past it: the student, the attention and the loss are inside.
"""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import accuracy, data_sets, snapshots, student

import eekd


def main(epochs: int = 6) -> float:
    """Trains a student and returns its accuracy on the validation images."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(0)
    train, val = data_sets()
    distilled = eekd.Distilled(student(), snapshots(train))
    optimizer = torch.optim.AdamW(distilled.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(train, 16, shuffle=True)  # pyright: ignore[reportArgumentType]
    distilled, optimizer, loader = accelerator.prepare(distilled, optimizer, loader)
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(distilled):
                accelerator.backward(distilled(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
    found = accuracy(accelerator.unwrap_model(distilled).student, val)
    accelerator.print(f"validation accuracy {found:.1%}")
    accelerator.end_training()
    return found


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
