"""Prediction: predictors, results, tiling, video and output files."""
