"""What is trained: a low-rank adapter, new embeddings, or the weights themselves."""
