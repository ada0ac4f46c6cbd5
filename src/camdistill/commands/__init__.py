"""What runs after training."""
