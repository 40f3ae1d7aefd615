"""What the project claims of speed, memory, search and resilience, each claim with its command."""
