"""Inversion: from an image to the noise from which sampling reconstructs it."""
