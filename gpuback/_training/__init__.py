"""Steps, epochs, optimizers, checkpoints."""
