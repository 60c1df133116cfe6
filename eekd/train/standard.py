"""The callbacks that every phase of a run has."""

from pathlib import Path

from eekd.train.callbacks import Callback, ReplicaCheck
from eekd.train.checkpoints import Checkpointing
from eekd.train.logs import asked_for
from eekd.train.loss_check import LossCheck
from eekd.train.metrics import MetricsLogger
from eekd.train.nonfinite import NonFiniteGuard
from eekd.train.session import Session


def standard_callbacks(
    session: Session, name: str, folder: Path, identity: dict, resume: bool, *more: Callback
) -> list[Callback]:
    """Checkpoints and signals, proofs that processes agree, checks of the numbers, `more`, and the log."""
    config = session.config
    return [
        ReplicaCheck(config.check_replicas),
        Checkpointing(folder, identity, session.device, every=config.save_every, resume=resume),
        NonFiniteGuard(folder),
        LossCheck(session, name, folder, config.verify_loss),
        *more,
        MetricsLogger(folder, asked_for(config), resume),
    ]
