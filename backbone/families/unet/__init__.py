"""What the families of Stable Diffusion and SDXL share: the UNet and its control networks."""
