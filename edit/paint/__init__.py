"""`edit paint`: a page with an image, for painting what may change and describing the result."""
