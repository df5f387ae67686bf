"""What is minimised: preference losses over pairs, reward gradients, policy gradients, and the data that they read."""
