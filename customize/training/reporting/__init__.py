"""A run's report, its card on the hub, and a copy of its folder without private paths."""
