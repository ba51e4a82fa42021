#!/usr/bin/env bash
# torture.sh [N]: N times (50), start nvtool torture, which does random
# transactions and keeps a record of what was acknowledged outside of the
# image; kill it with SIGKILL at a random moment; verify the record and check
# the image. Every N is split among a sealed qcow2, a plain raw image and a
# Pebble folder.
set -euo pipefail
umask 077
cd "$(dirname "$0")/.."
kills=${1:-50}
nvtool=$PWD/bin/nvtool

mkdir -p tmp
dir=$(mktemp -d "$PWD/tmp/torture.XXXXXX")
pid=
cleanup() {
	status=$?
	[[ -z $pid ]] || kill -9 "$pid" 2>/dev/null || true
	if ((status == 0)); then
		rm -rf "$dir"
	else
		echo "FAIL: torture: see $dir; seed $seed" >&2
	fi
	exit $status
}
trap cleanup EXIT

seed=${NVSTORE_SEED:-$(date +%s)}
RANDOM=$seed
echo "torture: seed $seed, $kills kills (repeat with NVSTORE_SEED=$seed scripts/torture.sh $kills)"

printf 'correct horse battery staple\n' >"$dir/pass"
head -c 32 /dev/urandom >"$dir/key"
"$nvtool" create "$dir/sealed.qcow2" -f qcow2 --key-file "$dir/key"
"$nvtool" create "$dir/plain.raw" -f raw
machine=6e76746f-6f6c-4000-8000-000000000001
"$nvtool" create "pebble:$dir/home/$machine" --key-file "$dir/key"

images=("$dir/sealed.qcow2" "$dir/plain.raw" "pebble:$dir/home/$machine")
keys=("--key-file $dir/key" "" "--key-file $dir/key")

for ((i = 0; i < kills; i++)); do
	image=${images[i % ${#images[@]}]}
	read -ra key <<<"${keys[i % ${#keys[@]}]}"
	"$nvtool" torture "$image" "${key[@]}" --seconds 600 >"$dir/log" 2>&1 &
	pid=$!
	sleep "0.$(printf %03d $((20 + RANDOM % 400)))"
	if ! kill -9 "$pid" 2>/dev/null; then
		cat "$dir/log"
		echo "torture: nvtool ended by itself" >&2
		exit 1
	fi
	wait "$pid" 2>/dev/null || true
	pid=
	"$nvtool" torture "$image" "${key[@]}" --verify >"$dir/log" 2>&1 || { cat "$dir/log"; exit 1; }
	# A crash may leave clusters of a qcow2 allocated: leaks (20) aren't damage.
	code=0
	"$nvtool" check "$image" "${key[@]}" >"$dir/log" 2>&1 || code=$?
	((code == 0 || code == 20)) || { cat "$dir/log"; exit 1; }
done
"$nvtool" check --repair-leaks "$dir/sealed.qcow2" --key-file "$dir/key" >"$dir/log" 2>&1 || { cat "$dir/log"; exit 1; }
if command -v qemu-img >/dev/null; then
	qemu-img check -q "$dir/sealed.qcow2"
fi
echo "torture: $kills kills, nothing lost"
