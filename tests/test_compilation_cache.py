"""The compilation cache: used, mended after a kill, cheap with many entries, and off when told."""

import os
import subprocess
import sys
import time
import zlib

import pytest

from kgrec_jax import compilation_cache

PROGRAM = """
import sys, warnings
warnings.simplefilter("error")
from kgrec_jax import compilation_cache
folder = compilation_cache.enable()
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("/cache_hits") else None)
print(float(jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T)(jnp.ones((4, 4))).sum()), len(hits) > 0, folder)
"""


def start(cache, **env):
    env = {**os.environ, "KGREC_CACHE": str(cache), "XLA_FLAGS": "", **env}
    out = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    assert out.stderr == ""
    value, hit, folder = out.stdout.split()
    return float(value), hit == "True", folder


def entries(cache):
    return sorted((cache / "compilation").glob("*/*-cache"))


def test_a_truncated_entry_is_deleted_before_jax_reads_it(tmp_path):
    first, hit, folder = start(tmp_path)
    assert not hit and compilation_cache.cpu_id() in folder
    again, hit, _ = start(tmp_path)
    assert hit and again == first
    for path in entries(tmp_path):  # what a kill -9 during a compilation leaves
        path.write_bytes(path.read_bytes()[:-40])
    again, hit, _ = start(tmp_path)  # under "error": no warning either
    assert not hit and again == first
    assert start(tmp_path)[1]


def test_switched_off(tmp_path):
    assert start(tmp_path, KGREC_NO_COMPILATION_CACHE="1")[2] == "None"
    assert not entries(tmp_path)


def test_hundreds_of_entries_take_milliseconds(tmp_path):
    body = zlib.compress(os.urandom(200_000))
    for i in range(400):
        (tmp_path / f"jit_f-{i}-cache").write_bytes(body)
    (tmp_path / "unrelated").write_bytes(b"x")
    assert compilation_cache.mend(tmp_path) == []
    began = time.perf_counter()
    assert compilation_cache.mend(tmp_path) == []
    assert time.perf_counter() - began < 0.2


@pytest.mark.parametrize("broken", [b"", b"plain", zlib.compress(b"a" * 9999)[:-1], b"\x28\xb5\x2f\xfd\x00\x00"])
def test_what_counts_as_broken(tmp_path, broken):
    (tmp_path / "a-cache").write_bytes(broken)
    (tmp_path / "b-cache").write_bytes(zlib.compress(b"whole"))
    assert compilation_cache.mend(tmp_path) == ["a-cache"]
    (tmp_path / "b-cache").write_bytes(broken)  # an entry that was whole once is not trusted for its name
    assert compilation_cache.mend(tmp_path) == ["b-cache"]


def test_the_oldest_go_when_the_cache_grows_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache, "_MAX_BYTES", 2500)
    for age, name in enumerate(("new", "middle", "old")):
        path = tmp_path / f"{name}-cache"
        path.write_bytes(zlib.compress(os.urandom(1000)))
        os.utime(path, ns=(10**18 - age, 10**18 - age))
    assert compilation_cache.mend(tmp_path) == ["old-cache"]
