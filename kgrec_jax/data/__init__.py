"""Plain NumPy: reading, checking, splitting; no JAX here."""
