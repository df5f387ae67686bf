"""Attention control without materialised maps: which tokens correspond, what is replaced, how it is installed."""
