"""What pretraining and classification share: config reading, run folder, loop, precision, distribution, checkpoints."""
