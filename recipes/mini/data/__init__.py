"""The drawn datasets that the mini models are trained on: plain folders of pictures with captions."""
