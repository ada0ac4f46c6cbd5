"""Compares explainers on one network, with controls."""
