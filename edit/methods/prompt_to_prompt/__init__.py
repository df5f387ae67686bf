"""Prompt-to-prompt: a target prompt sampled with the attention of the source."""
