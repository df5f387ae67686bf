"""What `customize train` learns of the development concepts, and what survives of it on a few-step model."""
