"""One edit from the command line: open, edit, measure, report."""
