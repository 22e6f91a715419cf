"""What the bytes of a matrix mean, where they lie, and how they are multiplied."""
