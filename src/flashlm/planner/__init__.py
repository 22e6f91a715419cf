"""Measure the device, cost a token, and plan before anything is loaded."""
