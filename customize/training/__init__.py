"""A training run from images to a finished concept folder."""
