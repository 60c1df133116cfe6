"""Snapshots of one training run: recorded as it goes, read back as M frozen teachers."""

from eekd.snapshots.ensemble import SnapshotEnsemble
from eekd.snapshots.features import LastFeatures
from eekd.snapshots.manifest import MANIFEST, read_entries, read_manifest
from eekd.snapshots.recorder import SnapshotRecorder

__all__ = ["MANIFEST", "LastFeatures", "SnapshotEnsemble", "SnapshotRecorder", "read_entries", "read_manifest"]
