"""Teacher to student."""
