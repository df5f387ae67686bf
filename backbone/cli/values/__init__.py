"""Values of settings: read from flags, files and keywords, checked, and said again as a command."""
