"""What is minimised: DreamBooth with prior preservation."""
