# What a page's blocks run in. A reader has longer: here init and preset write small numbers, and pages open nowhere.
set -euo pipefail
set -m # each program that serves is a process group of its own
served=()
trap 'for group in "${served[@]}"; do kill -TERM -- "-$group" 2>/dev/null || true; done' EXIT

espalier() {
  case $1 in ui) set -- "$@" --no-open --port "$PORT_5000" ;; esac
  command espalier "$@" || return
  case $1 in init | preset) python "$SHRINK" params.yaml ;; esac
}

make() { [ "$1" = test ] || command make "$@"; } # the suite would run itself

open() { test -s "$1"; }

answers() { # Prefect prints its address before it listens there
  local address
  address=$(grep -oE 'dashboard at http://[^/ ]+' "$1" | head -n 1 | sed 's|.*//||') || return 0
  (exec 3<>"/dev/tcp/${address%:*}/${address##*:}") 2>/dev/null
}

ready() { # the log of a program that serves, and what it prints once it is ready
  for _ in $(seq 1800); do
    ! { grep -qF -- "$2" "$1" && answers "$1"; } || return 0
    kill -0 -- "-${served[-1]}" 2>/dev/null || break
    sleep 0.1
  done
  cat "$1" >&2
  return 1
}
