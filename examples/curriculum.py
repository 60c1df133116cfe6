"""A schedule of your own: the student meets the snapshots one after another, the youngest teacher first.

eekd train --students ce uniform examples/curriculum.py:Curriculum
"""

from eekd.train import StudentTrainer


class Curriculum(StudentTrainer):
    """In the m-th of M equal stages of training the first m snapshots teach, all of them alike."""

    weighting = "uniform"

    def compute_loss(self, batch):
        met = 1 + self.epoch * len(batch.teacher.logits) // self.phase.epochs
        return super().compute_loss(batch._replace(teacher=batch.teacher.of(slice(met))))
