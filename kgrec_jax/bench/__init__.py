"""What `kgrec bench` measures; see `kgrec_jax.bench_commands` for the door."""
