#!/usr/bin/env bash
# resume.sh [FLAGS]: go on with the last run of the TPU VM: follow it where it still runs, else start the same command
# again, which continues at its last checkpoint. A VM that was stopped is started first.
set -euo pipefail
source "$(dirname "$0")/common.sh"
parse_flags "$@"
((${#REST[@]} == 0)) || fail "found ${REST[*]} after --, expected flags only: the command is the one of the last run.sh"

if $DRY_RUN; then
  tpu describe "$NAME" "--format=value(state)"
  state=READY
else
  state="$(tpu describe "$NAME" "--format=value(state)")"
fi
case "$state" in
  READY) ;;
  STOPPED) tpu start "$NAME" ;;
  PREEMPTED | TERMINATED)
    fail "found $NAME $state: a spot VM cannot be started again and its disk is gone; delete.sh, create.sh, setup.sh, run.sh"
    ;;
  *) fail "found $NAME in state ${state:-unknown}, expected READY or STOPPED; try again in a minute" ;;
esac
on_vm resume
