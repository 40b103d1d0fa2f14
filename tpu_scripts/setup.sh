#!/usr/bin/env bash
# setup.sh [FLAGS]: copy this checkout to the TPU VM and install it there; again after every change of the code.
set -euo pipefail
source "$(dirname "$0")/common.sh"
parse_flags "$@"
((${#REST[@]} == 0)) || fail "found ${REST[*]} after --, expected flags only"

root="$(cd "$(dirname "$0")/.." && pwd)"
archive="${TMPDIR:-/tmp}/kgrec.tgz"
if ! $DRY_RUN; then
  scratch="$(mktemp -d)"
  trap 'rm -rf "$scratch"' EXIT
  archive="$scratch/kgrec.tgz"
  # A list of what is needed, so that neither data nor runs nor environments travel.
  tar -czf "$archive" -C "$root" --exclude=__pycache__ pyproject.toml README.md LICENSE kgrec_jax configs tpu_scripts
fi
tpu scp "$archive" "$NAME:kgrec.tgz"
tpu ssh "$NAME" "--command=mkdir -p kgrec && tar -xzf kgrec.tgz -C kgrec"
on_vm setup
