"""Cost a token, and plan before anything is loaded."""
