#!/usr/bin/env bash
# The demo: each step prints the command before it runs it.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PWD/bin:$PATH

mkdir -p tmp
dir=$(mktemp -d "$PWD/tmp/demo.XXXXXX")
trap 'rm -rf "$dir"' EXIT
cd "$dir"

step() { printf '\n\033[1m# %s\033[0m\n' "$*"; }
run() {
	printf '$ %s\n' "$*"
	"$@"
}
# refuse CODE COMMAND...: the command must fail with this exit code.
refuse() {
	local want=$1 got=0
	shift
	printf '$ %s\n' "$*"
	"$@" || got=$?
	if ((got != want)); then
		echo "demo: exit code $got, expected $want" >&2
		exit 1
	fi
}

step "What is here"
run nvtool --help
