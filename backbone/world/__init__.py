"""The rendered world that `moji` knows: emoji glyphs standing in drawn places, described by a sentence.

`words` is the vocabulary and its sentences, `scene` the value that a picture is made from, `render` the drawing,
`styles` the four filters. Rendering needs the Noto Color Emoji font; using the trained model does not.
"""
