# Flags and gcloud calls that the five scripts share; sourced, not run. Works in the bash 3.2 of macOS too.
# shellcheck shell=bash disable=SC2034  # the flags are read by the scripts that source this

NAME="${TPU_NAME:-kgrec}"
PROJECT="${TPU_PROJECT:-}"
ZONE="${TPU_ZONE:-}"
TYPE="${TPU_TYPE:-v5litepod-8}"
VERSION="${TPU_VERSION:-}"
SPOT=false
YES=false
DRY_RUN=false
REST=()

fail() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

# The comment at the head of the calling script is its help text.
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  cat <<'TEXT'

Flags (or the environment variable in brackets):
  --name NAME        the TPU VM's name [TPU_NAME, kgrec]
  --project PROJECT  the cloud project [TPU_PROJECT, gcloud's own setting]
  --zone ZONE        the zone [TPU_ZONE, gcloud's own setting]
  --type TYPE        accelerator type [TPU_TYPE, v5litepod-8]
  --version VERSION  software of the VM [TPU_VERSION, the usual one of the type]
  --spot             create: a cheaper VM that may be taken away at any time
  --yes              delete: do not ask
  --dry-run          print the gcloud commands and run none of them
TEXT
}

parse_flags() {
  while (($#)); do
    case "$1" in
      --name | --project | --zone | --type | --version)
        (($# > 1)) || fail "found $1 without a value, expected $1 VALUE"
        case "$1" in
          --name) NAME="$2" ;;
          --project) PROJECT="$2" ;;
          --zone) ZONE="$2" ;;
          --type) TYPE="$2" ;;
          --version) VERSION="$2" ;;
        esac
        shift 2
        ;;
      --spot) SPOT=true; shift ;;
      --yes) YES=true; shift ;;
      --dry-run) DRY_RUN=true; shift ;;
      -h | --help) usage; exit 0 ;;
      --) shift; REST=("$@"); break ;;
      *) fail "found $1, expected a flag (see --help); what kgrec is to do comes after --" ;;
    esac
  done
  [[ $NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || fail "found the name '$NAME', expected small letters, digits and hyphens"
  PLACE=()
  if [[ -n $PROJECT ]]; then PLACE+=("--project=$PROJECT"); fi
  if [[ -n $ZONE ]]; then PLACE+=("--zone=$ZONE"); fi
  $DRY_RUN || command -v gcloud >/dev/null || fail "found no gcloud, expected the Google Cloud CLI on the PATH; install it, or use --dry-run"
}

# The software that Cloud TPU documents for each generation.
default_version() {
  case "$1" in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-* | v5e-*) echo v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) fail "found the accelerator type '$1', expected one of v2 … v6e such as v5litepod-8; or give --version as well" ;;
  esac
}

# tpu VERB ARGUMENT...: one gcloud call, or its text in a dry run.
tpu() {
  local verb="$1"
  shift
  local command=(gcloud compute tpus tpu-vm "$verb" "$@" ${PLACE[@]+"${PLACE[@]}"})
  if $DRY_RUN; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}"
  fi
}

on_vm() {
  tpu ssh "$NAME" "--command=bash kgrec/tpu_scripts/on_vm.sh $1"
}
