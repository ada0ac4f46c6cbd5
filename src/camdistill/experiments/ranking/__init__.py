"""Ranks explanation methods by how much they teach a student."""
