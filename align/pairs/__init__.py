"""Preferences as data: prompts, pairs, single judgements, and the files and tables that they come from."""
