"""Measuring images and claims: CLIP-like scorers, image metrics, intervals."""
