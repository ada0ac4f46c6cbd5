"""Single units: what excites them, what they see, and how they pair."""
