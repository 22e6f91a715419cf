"""From a checkpoint to a pack, and the proof that a pack is whole."""
