"""Curves, overlays, confusion matrices and fonts."""
