"""What a run says of itself: its report, its card on the hub, and the folder without private paths."""
