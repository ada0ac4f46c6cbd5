"""Perturbs images and scores them: what is removed, what replaces it, and the network's scores."""
