"""Short runnable scripts; the first lines of each say the command, what it costs and what it should show."""
