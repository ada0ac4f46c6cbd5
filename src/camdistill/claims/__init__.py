"""The Grad-CAM paper's claims, each as a small experiment with a pass criterion."""
