"""What is kept of a clip <-> bundle.pt; and adapter files."""
