"""What every verb shares, opened once and used many times: encoding, compressor, session."""
