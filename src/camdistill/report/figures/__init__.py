"""Arrays in, pictures out; the only modules that know matplotlib."""
