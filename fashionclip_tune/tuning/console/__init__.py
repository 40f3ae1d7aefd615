"""What a terminal shows of a sweep: its plan, its progress, its result."""
