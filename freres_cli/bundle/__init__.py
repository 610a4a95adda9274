"""Bundle files, which hold what is kept of a clip, and adapter files."""
