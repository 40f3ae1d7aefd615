"""Photos by words or by a photo, with any model: vectors that are kept, and exact search among them."""
