#!/usr/bin/env bash
# create.sh [FLAGS]: make one TPU VM. It costs money from now on, until delete.sh.
set -euo pipefail
source "$(dirname "$0")/common.sh"
parse_flags "$@"
((${#REST[@]} == 0)) || fail "found ${REST[*]} after --, expected flags only"

if [[ -z $VERSION ]]; then VERSION="$(default_version "$TYPE")"; fi
arguments=("--accelerator-type=$TYPE" "--version=$VERSION")
if $SPOT; then arguments+=(--spot); fi
tpu create "$NAME" "${arguments[@]}"
