"""What the machine has, and what is wrong with it."""
