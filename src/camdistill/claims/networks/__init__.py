"""Networks that the claims need beside the shipped ones, trained in seconds or minutes."""
