"""The training loop, its optimiser, attention that is fast backwards, cached predictions of the frozen base."""
