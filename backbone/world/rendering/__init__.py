"""Drawing a scene: where accessories attach, the record of each part, styles and textures."""
