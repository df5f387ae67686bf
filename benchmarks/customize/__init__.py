"""How well `customize train` learns the development concepts, and how much survives on a few-step model."""
