"""What judges images of `moji`'s world: networks that read them, distances, faithfulness."""
