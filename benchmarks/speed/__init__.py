"""Time and memory, as a ratio to a peer in the same run; plans beside what came."""
