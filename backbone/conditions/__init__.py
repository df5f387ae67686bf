"""The conditions of a denoiser's prediction."""
