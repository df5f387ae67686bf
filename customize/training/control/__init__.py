"""`customize train-control`: a network that reads maps, from its options to its folder."""
