"""Asking a network about changed images: what is changed, by what it is replaced, the answers."""
