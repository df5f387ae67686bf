"""Tune a model to preferences: pairs, scorers, DPO. Being built; see `align.cli`."""
