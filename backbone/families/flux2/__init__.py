"""FLUX.2: klein, base and distilled, and dev."""
