"""The parts of the demo model's training; `train.py` beside this package is the command."""
