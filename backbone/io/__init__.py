"""Files, the console, run folders, reports."""
