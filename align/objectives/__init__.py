"""The objectives: preference losses over pairs, reward gradients, policy gradients, and their data."""
