"""What goes in and out: the command line, its options, files of prompts."""
