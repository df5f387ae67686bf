"""The synthetic world that `moji` was trained on: emoji glyphs in drawn places, described by captions.

`words` has the vocabulary and captions, `scene` the value that is rendered, `rendering` the drawing with the four
image filters, `maps` and `clip` the ground truth, `edits` and `motions` what changes. Rendering needs the Noto Color
Emoji font; using the trained model does not.
"""
