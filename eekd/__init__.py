"""Experience Ensemble Knowledge Distillation."""
