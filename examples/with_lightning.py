"""A student in Lightning.

pip install lightning
python examples/with_lightning.py
"""

import sys

import lightning
import torch
from digits import accuracy, data_sets, snapshots, student

import eekd


class Student(lightning.LightningModule):
    """Lightning's checkpoints hold the student and the attention."""

    def __init__(self, distilled: eekd.Distilled):
        super().__init__()
        self.distilled = distilled

    def training_step(self, batch, number):
        output = self.distilled(**batch)
        self.log("loss", output.loss)
        return output.loss

    def validation_step(self, batch, number):
        self.log("val_loss", self.distilled(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def main(epochs: int = 6, folder: str | None = None) -> float:
    """Trains a student and returns its accuracy on the validation images."""
    train, val = data_sets()
    loaders = [torch.utils.data.DataLoader(part, 32, shuffle=part is train) for part in (train, val)]  # pyright: ignore
    module = Student(eekd.Distilled(student(), snapshots(train)))
    trainer = lightning.Trainer(max_epochs=epochs, logger=False, enable_progress_bar=False, default_root_dir=folder)
    trainer.fit(module, *loaders)
    return accuracy(module.distilled.student, val)


if __name__ == "__main__":
    print(f"validation accuracy {main(*map(int, sys.argv[1:])):.1%}")
