"""The arithmetic of decoding, apart from any network."""
