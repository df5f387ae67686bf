"""Clips of `moji`: by their words, of a learned subject, by a learned motion, and from an edited first frame."""
