"""The synthetic world that `moji` was trained on: emoji glyphs in drawn places, described by captions.

`words` has the vocabulary and captions, `scene` the value that is rendered, `render` the drawing, `styles` the
four image filters. Rendering needs the Noto Color Emoji font; using the trained model does not.
"""
