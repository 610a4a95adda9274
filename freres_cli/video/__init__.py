"""video -> frames: decoding with PyAV and the index arithmetic of sampling."""
