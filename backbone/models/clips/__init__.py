"""Models that draw clips: motion adapters, a camera's path, SparseCtrl, a picture that begins to move."""
