"""The map of each stage: Config, init, loss, evaluate, run."""
