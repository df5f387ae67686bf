"""Krea 2, raw and turbo."""
