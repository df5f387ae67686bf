"""Where images come from: files decoded, folders and datasets listed, datasets of the hub streamed."""
