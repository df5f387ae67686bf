"""How much memory a run needs, and what to change so that it fits."""
