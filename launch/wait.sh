# shellcheck shell=bash
# Starting a process and waiting for it where signals come: task.sh and local.sh source this.

set +o posix # else bash forgets a status that it has told once

STOPPED='' # when the first signal came
STOP=''    # what a signal calls with the child's number, once there is one
CHILD=''

# before a child is started: of the signals $2… none is lost from here on, and none ends this script while the child runs on
listen() {
    STOP=$1 CHILD=''
    trap ': "${STOPPED:=$SECONDS}"; [[ -z $CHILD ]] || "$STOP" "$CHILD"' "${@:2}"
}

# wait for the child $1, and answer its status; bash would hold a signal back until a command in the foreground has ended
wait_for() {
    local status=0
    sleep 0.1 || true # before bash 5.1 a child just forked would take a TERM for this script's, and forget it
    CHILD=$1
    [[ -z $STOPPED ]] || "$STOP" "$CHILD"
    while kill -0 "$CHILD" 2>/dev/null; do status=0; wait "$CHILD" || status=$?; done # a trap ends wait early
    # bash knows its status, unless a signal came just as it ended: then it counts it as running, and would wait for ever
    if [[ $'\n'$(jobs -rp)$'\n' != *$'\n'"$CHILD"$'\n'* ]]; then status=0; wait "$CHILD" || status=$?; fi
    return "$status"
}

end() { kill -TERM "$1" 2>/dev/null || true; }
