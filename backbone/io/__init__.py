"""Files, console output, run folders, HTML reports."""
