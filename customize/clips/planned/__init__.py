"""Clips that are planned from their words: a thing is cut out of one drawing and moved, a camera sees parts of one."""
