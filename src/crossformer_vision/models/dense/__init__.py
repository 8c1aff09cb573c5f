"""Detectors and segmenters on feature pyramids from any timm model."""
