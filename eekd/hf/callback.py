"""M evenly spaced snapshots of a Trainer's run."""

from pathlib import Path

from transformers import TrainerCallback

from eekd.io.files import write_json_atomic
from eekd.snapshots.files import SCHEDULE
from eekd.snapshots.manifest import stage_ends


class SnapshotCallback(TrainerCallback):
    """Makes a Trainer save M checkpoints, at the end of M stages of equal length.

        Trainer(model, TrainingArguments("teacher-run", save_strategy="no"), callbacks=[SnapshotCallback(5)], ...)

    In a run of S steps stage m ends with step S m // M, so the last snapshot is the finished model. The run's folder
    may hold other checkpoints, too: `eekd_snapshots.json` lists those that are snapshots.

    Raises TypeError or ValueError for other numbers; before training ValueError if the run has fewer steps than M, or
    if `save_total_limit` would delete snapshots.
    """

    def __init__(self, snapshots: int = 5):
        if type(snapshots) is not int:
            raise TypeError(f"snapshots must be an int, got {snapshots!r}")
        if snapshots < 1:
            raise ValueError(f"snapshots must be at least 1, got {snapshots}")
        self.snapshots = snapshots
        self.steps: list[int] = []

    def on_init_end(self, args, state, control, **kwargs):
        if args.save_total_limit is not None:
            raise ValueError(
                f"save_total_limit must be None, for it deletes early snapshots, got {args.save_total_limit}"
            )

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_init_end(args, state, control)  # the callback may have been added later
        if state.max_steps < self.snapshots:
            raise ValueError(f"snapshots must be at most {state.max_steps}, the steps of the run, got {self.snapshots}")
        self.steps = stage_ends(state.max_steps, self.snapshots)
        if state.is_world_process_zero:
            write_json_atomic(Path(str(args.output_dir)) / SCHEDULE, {"steps": self.steps})

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            control.should_save = True
