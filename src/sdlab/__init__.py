"""sdlab: turn folders of pictures into your own image model, and get pictures back."""

__version__ = "0.1.0"
