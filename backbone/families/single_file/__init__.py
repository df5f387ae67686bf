"""Single-file checkpoints, of the original repositories and as ComfyUI lays them."""
