#!/usr/bin/env bash
# on_vm.sh setup | start ARGUMENTS OF kgrec | resume: the other end of the scripts, run on the TPU VM by them.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  printf 'kgrec on the TPU VM: %s\n' "$1" >&2
  exit 2
}

# The VM's own Python may be older than the project allows.
setup() {
  local python candidate
  python=""
  for candidate in python3.13 python3.12 python3.11 python3; do
    if "$candidate" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python="$candidate"
      break
    fi
  done
  if [[ -z $python ]]; then
    sudo apt-get update -q
    sudo apt-get install -q -y python3.11 python3.11-venv
    python=python3.11
  fi
  [[ -x .venv/bin/python ]] || "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet -e '.[tpu]'
  .venv/bin/python -c 'import jax; print(jax.device_count(), "devices:", jax.devices()[0].device_kind)'
}

running() {
  [[ -f last/pid ]] && kill -0 "$(cat last/pid)" 2>/dev/null
}

# The command, its log, its process id and its exit status lie in last/.
start() {
  if running; then fail "found a run that is still going (process $(cat last/pid)); resume.sh follows it"; fi
  mkdir -p last
  rm -f last/status
  printf '%q ' "$@" >last/command
  : >last/log
  # shellcheck disable=SC2016  # the inner shell expands it
  setsid nohup bash -c '.venv/bin/kgrec "$@"; echo $? >last/status' kgrec "$@" >>last/log 2>&1 </dev/null &
  echo $! >last/pid
  follow
}

follow() {
  tail --pid="$(cat last/pid)" -n +1 -f last/log
  [[ -f last/status ]] || fail "found that the run ended without a status, as after kill -9 or a reboot; resume.sh goes on with it"
  exit "$(cat last/status)"
}

resume() {
  [[ -f last/command ]] || fail "found no earlier run on this VM, expected one; start it with run.sh"
  if running; then follow; fi
  local arguments
  eval "arguments=($(cat last/command))" # written by start with %q
  start "${arguments[@]}"
}

(($#)) || fail "found no word, expected setup, start or resume"
verb="$1"
shift
case "$verb" in
  setup) setup ;;
  start) start "$@" ;;
  resume) resume ;;
  *) fail "found $verb, expected setup, start or resume" ;;
esac
