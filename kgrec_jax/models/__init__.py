"""Linen modules and pure functions of parameters; they know no training, no config file, no mesh."""
