"""`edit paint`: a page with an image, on which one paints what may change and says what it is to be."""
