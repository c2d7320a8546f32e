"""What the loop needs around it."""
