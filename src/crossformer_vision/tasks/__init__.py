"""LightningModules of the tasks, with their optimizers, losses and metrics."""
