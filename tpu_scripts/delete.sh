#!/usr/bin/env bash
# delete.sh [FLAGS]: delete the TPU VM and its disk. Fetch the runs first:
#
#   gcloud compute tpus tpu-vm scp --recurse NAME:kgrec/runs/one runs/ --zone=ZONE
set -euo pipefail
source "$(dirname "$0")/common.sh"
parse_flags "$@"
((${#REST[@]} == 0)) || fail "found ${REST[*]} after --, expected flags only"

arguments=()
if $YES; then arguments+=(--quiet); fi
tpu delete "$NAME" ${arguments[@]+"${arguments[@]}"}
