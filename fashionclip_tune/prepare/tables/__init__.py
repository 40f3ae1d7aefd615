"""Tables as shops have them, read as text."""
