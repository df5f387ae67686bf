"""Files, console output, run folders, HTML reports; command options and their help."""
