"""`customize transfer`: an adapter fitted to a few-step model."""
