"""Few-step models: distilled relatives of a base, as a model of their own or as a LoRA on it."""
