"""What goes in and out of the program: the options of its commands, and their help."""
