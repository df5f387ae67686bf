"""What every method shares: the noise algebra and its samplers below, models, adapters and training above."""
