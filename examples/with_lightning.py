"""A student in Lightning.

pip install lightning
python examples/with_lightning.py
"""

import sys
import tempfile

import lightning
import torch
from digits import accuracy, data_sets, snapshots, student
from torch.utils.data import DataLoader

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


def main(epochs: int = 6) -> float:
    """Trains a student and returns its accuracy on the validation images."""
    train, val = data_sets()
    loader, val_loader = (DataLoader(part, 32, shuffle=part is train) for part in (train, val))  # pyright: ignore
    module = Student(eekd.Distilled(student(), snapshots(train)))
    options = {"logger": False, "enable_progress_bar": False, "default_root_dir": tempfile.mkdtemp()}
    lightning.Trainer(max_epochs=epochs, **options).fit(module, loader, val_loader)  # pyright: ignore
    return accuracy(module.distilled.student, val)


if __name__ == "__main__":
    print(f"validation accuracy {main(*map(int, sys.argv[1:])):.1%}")
