"""Stable Diffusion 1.x and 2.x, and whatever shares their UNet pipeline."""
