"""Edits whose true answer is known: by words, by removal, and what null-text inversion reconstructs."""
