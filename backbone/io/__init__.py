"""Files, console output, run folders, HTML reports, weights, the hub."""
