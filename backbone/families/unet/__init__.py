"""Shared by Stable Diffusion and SDXL: the UNet and its control networks."""
