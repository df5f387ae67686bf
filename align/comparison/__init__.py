"""Compare two models on the same prompts: win rates by scorers, and by a person in a blind test."""
