"""Clips: drawn from words and concepts, motions learned from clips, and what is measured of them."""
