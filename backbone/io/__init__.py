"""Files, the console, run folders, reports; the options of commands and their help."""
