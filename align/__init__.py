"""Tunes a model to preferences: pairs, scorers, DPO. Being built; see `cli`."""
