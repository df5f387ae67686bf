"""What the command lines are made of: groups of commands, options from dataclasses, `--help`; Python's keywords too."""
