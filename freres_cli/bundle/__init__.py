"""tracks <-> bundle.pt."""
