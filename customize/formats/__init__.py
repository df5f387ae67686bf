"""Adapter files of this and other programs: reading, writing, converting, merging, baking."""
