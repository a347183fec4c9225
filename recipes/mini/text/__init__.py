"""Text encoders for the mini models whose weights are written down: no training, the same bytes every time."""
