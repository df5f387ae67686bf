"""Preference data: prompts, pairs, single labelled images, and the files and tables that they are read from."""
