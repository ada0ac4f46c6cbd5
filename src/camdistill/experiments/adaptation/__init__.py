"""Adapts an explainer's parameters to what its maps teach a student."""
