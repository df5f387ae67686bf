"""Speed and memory: compared with other tools' scripts, on a GPU, from disk."""
