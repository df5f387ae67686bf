"""A preference run from pairs or a scorer to a folder that serves as a concept."""
