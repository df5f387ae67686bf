"""Collecting preferences: sampled images, scores, rankings, and the page on which a person chooses."""
