"""Clips: sampled from prompts and concepts, motions learned from clips, and their evaluation."""
