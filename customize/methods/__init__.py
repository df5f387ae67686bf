"""Trainable parameters: a low-rank adapter, new embeddings, or the weights themselves."""
