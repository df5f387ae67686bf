"""Conditions on a picture's layout: maps, line drawings, camera paths, views."""
