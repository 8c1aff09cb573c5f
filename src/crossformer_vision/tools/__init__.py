"""Tools that analyze models and runs."""
