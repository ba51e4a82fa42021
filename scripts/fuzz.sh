#!/usr/bin/env bash
# Runs every fuzz target of the module for $FUZZTIME (60s), one after another.
# Arguments, if any, are packages: scripts/fuzz.sh ./blobdir
set -euo pipefail
cd "$(dirname "$0")/.."
fuzztime=${FUZZTIME:-60s}

if (($# > 0)); then
	packages=("$@")
else
	# Listing compiles the tests, so look only where there are targets.
	mapfile -t packages < <(git ls-files -co --exclude-standard '*_test.go' |
		xargs grep -l '^func Fuzz' | xargs -n1 dirname | sort -u | sed 's|^|./|')
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT

# fuzz runs one target. Inputs that only reach new code are made smaller for a
# moment, not for the minute that go test takes by default, which is all the time
# there is. On a busy machine go test sometimes fails at the end with nothing but
# a deadline; such a run is repeated.
fuzz() {
	for _ in 1 2 3 4; do
		if go test "$1" -run '^$' -fuzz "^$2\$" -fuzztime "$fuzztime" -fuzzminimizetime 500x 2>&1 | tee "$log"; then
			return 0
		fi
		if grep -q 'Failing input written' "$log" || ! grep -q 'context deadline exceeded' "$log"; then
			return 1
		fi
	done
	return 1
}

failed=()
for pkg in "${packages[@]}"; do
	for target in $(go test -list '^Fuzz' "$pkg" | grep '^Fuzz' || true); do
		echo "fuzz $pkg $target for $fuzztime"
		fuzz "$pkg" "$target" || failed+=("$pkg $target")
	done
done

if ((${#failed[@]} > 0)); then
	printf 'FAIL: %s\n' "${failed[@]}"
	exit 1
fi
