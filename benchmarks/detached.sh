#!/usr/bin/env bash
# A benchmark that outlives the command that starts it, on a machine where commands are cut off and the checkout may change under it.
#
#   benchmarks/detached.sh start FOLDER COMMAND…     run COMMAND in FOLDER/repo, a copy of the checkout; its output is FOLDER/log
#   benchmarks/detached.sh look FOLDER SECONDS OUT   wait so long, or until it has ended; show the end of its log and its exit
#                                                    status, and put the log and FOLDER/out, as they are, in OUT/out.tgz
set -euo pipefail

pack() { # a file that is written to meanwhile is no error
	tar --warning=no-file-changed -czf "$1/.out.tgz" -C "$2" log out || [[ $? == 1 ]]
	mv "$1/.out.tgz" "$1/out.tgz"
}

refuse() {
	echo "$*" >&2
	exit 2
}

goes_on() { [[ ! -e $folder/status && -s $folder/pid ]] && kill -0 "$(<"$folder/pid")" 2>/dev/null; }

usage=$(sed -n '2,6s/^# \?//p' "${BASH_SOURCE[0]}")
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
case ${1:-} in
start)
	(($# >= 3)) || refuse "$usage"
	folder=$(realpath -m "$2")
	shift 2
	[[ $folder/ != "$root"/* ]] || refuse "$folder is in the checkout, which is copied there: give a folder outside $root."
	! goes_on || refuse "$folder has a command that goes on: look at it, or give another folder."
	rm -rf "$folder/repo" "$folder/status"
	mkdir -p "$folder/out" "$folder/repo"
	tar -C "$root" --exclude=./.git --exclude=./.venv --exclude=./runs -cf - . | tar -C "$folder/repo" -xf -
	cd "$folder/repo"
	# shellcheck disable=SC2016  # expanded by the shell that is started
	setsid nohup bash -c 'folder=$1; shift; status=0; "$@" || status=$?; echo "$status" >"$folder/status"' \
		detached "$folder" "$@" >"$folder/log" 2>&1 </dev/null &
	echo "$!" >"$folder/pid"
	sleep 1 # so that it is in a session of its own before this one ends
	;;
look)
	(($# == 4)) || refuse "$usage"
	folder=$(realpath -m "$2") seconds=$3 out=$4
	[[ -e $folder/log ]] || refuse "$folder has no log: start a command there first."
	mkdir -p "$out"
	for ((i = 0; i < seconds; i++)); do
		goes_on || break
		((i % 30)) || pack "$out" "$folder" # for a look that is cut off
		sleep 1
	done
	tail -n 20 "$folder/log"
	if goes_on; then
		echo "goes on"
	elif [[ -e $folder/status ]]; then
		echo "ended with status $(<"$folder/status")"
	else
		echo "was killed: start may begin it again"
	fi
	pack "$out" "$folder"
	;;
*) refuse "$usage" ;;
esac
