"""The method: attention over snapshots, fixed weightings, the loss, top-k logits."""
