"""Training data: folders and subjects, masks, the example images, the encoded dataset."""
