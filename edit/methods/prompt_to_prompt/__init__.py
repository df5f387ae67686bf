"""Prompt-to-prompt: an edited prompt drawn with the attention of the source."""
