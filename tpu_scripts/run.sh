#!/usr/bin/env bash
# run.sh [FLAGS] -- ARGUMENTS OF kgrec: start kgrec on the TPU VM and follow it.
#
#   run.sh --zone us-west4-a -- run configs/default.py --data.path data --workdir runs/one
#
# The run does not depend on this terminal: Ctrl-C ends the following, not the run; resume.sh follows it again.
set -euo pipefail
source "$(dirname "$0")/common.sh"
parse_flags "$@"
((${#REST[@]} > 0)) || fail "found nothing after --, expected what kgrec is to do, such as -- quickstart"

on_vm "start $(printf '%q ' "${REST[@]}")"
