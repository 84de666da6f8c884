# shellcheck shell=bash
# Waiting for a process where signals come: task.sh and local.sh source this.

set +o posix # else bash forgets a status that it has told once

# answer the status of child $1 once it has ended
wait_for_end() {
    local status=0
    while kill -0 "$1" 2>/dev/null; do status=0; wait "$1" || status=$?; done # a trap ends wait early
    # bash knows its status, unless a signal came just as it ended: then it counts it as running, and would wait for ever
    if [[ $'\n'$(jobs -rp)$'\n' != *$'\n'"$1"$'\n'* ]]; then status=0; wait "$1" || status=$?; fi
    return "$status"
}
