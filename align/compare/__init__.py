"""Two models beside each other on the same prompts: wins by scorers, and by a person who chooses blindly."""
