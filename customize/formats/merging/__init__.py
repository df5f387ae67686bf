"""Merge, resize and extract adapters, write the result, bake it into a model."""
