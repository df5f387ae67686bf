"""What a preference run says of itself: its logs, the images that it draws, its report."""
