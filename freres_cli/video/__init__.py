"""video -> frames: decoding with PyAV, and choosing which frames to sample."""
