"""How files are kept: whole or not at all, with digests."""
