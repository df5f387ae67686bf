"""Names of layers in every tool, their translation to diffusers' names, and layers that are fused elsewhere."""
