"""Metrics for images of `moji`'s world: a classifier and a reader, distances, fidelity."""
