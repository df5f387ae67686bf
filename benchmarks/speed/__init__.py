"""How fast and how large: beside other tools' scripts, on a GPU, from disk."""
