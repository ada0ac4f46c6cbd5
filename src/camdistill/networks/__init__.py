"""What is trained and what is explained."""
