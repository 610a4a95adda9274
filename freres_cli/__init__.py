"""freres: video made cheap for video language models."""

__version__ = "0.1.0"
