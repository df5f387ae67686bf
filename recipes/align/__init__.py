"""Preference tuning on `moji`, measured: prompt fidelity, a stated preference, how many pairs are enough."""
