"""What preferences are made of: drawn images, scores, rankings, and the page on which a person chooses."""
