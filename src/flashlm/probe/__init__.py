"""What this machine and its devices can do, as measured."""
