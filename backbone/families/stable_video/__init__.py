"""Stable Video Diffusion: a picture becomes a clip."""
