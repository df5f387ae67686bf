"""The training loop, its settings, its optimiser, fast attention backwards, cached predictions of the frozen base."""
