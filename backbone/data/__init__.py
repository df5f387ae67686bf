"""Encoded data on disk: tables of tensors that are memory-mapped, and batches that are made ahead."""
