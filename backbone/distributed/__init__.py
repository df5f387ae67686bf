"""Devices and processes: precision, launching, sharding."""
