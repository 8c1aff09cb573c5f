"""Execution strategies for CPUs."""
