"""Explainers measured side by side on one network, with their controls."""
