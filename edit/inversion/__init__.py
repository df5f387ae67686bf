"""From an image back to the noise that draws it."""
