"""Units closely: what excites them, what they see, how they pair."""
