"""Preference tuning on `moji`, measured: prompt fidelity, a taste, how many pairs are enough."""
