"""Values of settings: read from flags, files and keywords, checked, and written as a command."""
