"""What a denoiser is conditioned on."""
