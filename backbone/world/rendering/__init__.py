"""Drawing a scene: where accessories attach, what is written down of each part, styles and textures."""
