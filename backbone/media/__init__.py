"""Images on their way in and out: folders and datasets, decoding, resizing and cropping, contact sheets."""
