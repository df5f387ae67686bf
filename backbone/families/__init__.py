"""Model families, a folder each: how parts are stored, prompts encoded, the network called, and on which noise path."""
