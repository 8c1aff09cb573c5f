"""One LightningModule a task, and the run that trains or validates it."""
