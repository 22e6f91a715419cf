"""The memory budget: what the machine allows, what a model needs, and what is left to pin."""
