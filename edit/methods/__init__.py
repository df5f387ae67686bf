"""The editing methods, a file each."""
