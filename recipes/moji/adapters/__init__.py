"""What is trained on top of `moji`: control, motion, edits by instruction, few steps."""
