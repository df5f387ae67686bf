"""Evaluation: CLIP and DINO scores, image metrics, confidence intervals."""
