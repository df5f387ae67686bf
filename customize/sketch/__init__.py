"""`customize sketch`: a page to draw lines on, which shows the model's images of them."""
