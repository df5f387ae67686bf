"""Trained parameters beside a frozen model: low-rank adapters, token embeddings, and the concept folder."""
