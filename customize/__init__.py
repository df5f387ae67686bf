"""Teaches a model a new concept from a handful of pictures."""
