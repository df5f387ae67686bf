"""`customize sketch`: a page to draw lines on, and beside them what the model makes of them."""
