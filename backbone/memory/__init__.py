"""Memory planning: count what a run needs, and find the cheapest settings with which it fits a device."""
