"""What all verbs share, opened once and used many times: encoding, compressor, session."""
