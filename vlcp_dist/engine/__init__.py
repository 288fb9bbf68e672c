"""Runs the units of a stage, in this process or on Ray actors."""
