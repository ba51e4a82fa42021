#!/usr/bin/env bash
# The demo: a machine's TPM state, network card EEPROM and VPD in one sealed
# qcow2. Each step prints the command before it runs it, and each claim is
# checked; the first that doesn't hold ends it. Needs bin/nvtool (make build)
# and coreutils, nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PWD/bin:$PATH
fixtures=$PWD/fixtures

dir=$(mktemp -d)
cleanup() {
	local status=$?
	rm -rf "$dir"
	((status == 0)) || echo "demo: FAILED" >&2
}
trap cleanup EXIT
cd "$dir"
cp "$fixtures/vpd/nic.pci.jsonc" "$fixtures/vpd/nic-eeprom.raw.jsonc" "$fixtures/tpm/tpm2-00.permall" .

# Bold, where that shows.
bold='' plain=''
if [[ -t 1 ]]; then
	bold=$'\033[1m' plain=$'\033[0m'
fi
checks=0
step() { printf '\n%s# %s%s\n' "$bold" "$*" "$plain"; }
pass() {
	checks=$((checks + 1))
	printf '%s[%d] ok: %s%s\n' "$bold" "$checks" "$*" "$plain"
}
fail() {
	echo "demo: $*" >&2
	exit 1
}

# run COMMANDLINE: prints it, and runs it in this shell.
run() {
	printf '$ %s\n' "$1"
	eval "$1"
}

# refuse CODE COMMANDLINE: the command must fail with this exit code. What it
# says is shown, and kept in the file said.
refuse() {
	local got=0
	printf '$ %s; echo $?\n' "$2"
	eval "$2" >said 2>&1 || got=$?
	cat said
	printf '%s\n' "$got"
	((got == $1)) || fail "exit code $got, and $1 is documented: $2"
}

# says TEXT: the file said must hold it.
says() { [[ $(<said) == *"$1"* ]] || fail "nothing was said of: $1"; }

# sums FILE: the SHA-256 of all blobs in the image, with their names.
sums() {
	local name sum
	nvtool ls vm.qcow2 --passphrase-file pass | while IFS= read -r name; do
		sum=$(nvtool get vm.qcow2 "$name" --passphrase-file pass | sha256sum)
		printf '%s  %s\n' "${sum%% *}" "$name"
	done >"$1"
}

# chunk_of BLOB: the offset of its first chunk in the disk, as the map has it.
chunk_of() {
	local line off=
	while IFS= read -r line; do
		case $line in
		*'"offset": '*) off=${line//[!0-9]/} ;;
		*"\"blob\": \"$1\""*)
			echo "$off"
			return
			;;
		esac
	done < <(nvtool map vm.qcow2 --json --passphrase-file pass)
	fail "the map has no blob $1"
}

# number FILE OFFSET BYTES: a big-endian number in a file.
number() { echo $((16#$(od -An -v -tx1 -j "$2" -N "$3" "$1" | tr -d ' \n'))); }

# in_file IMAGE OFFSET: where a byte of the disk lies in a qcow2 file, by its
# two levels of tables.
in_file() {
	local bits l1 l2 cluster mask=$((0x00fffffffffffe00))
	bits=$(number "$1" 20 4)
	l1=$(number "$1" 40 8)
	l2=$(($(number "$1" $((l1 + 8 * ($2 >> (2 * bits - 3)))) 8) & mask))
	cluster=$(($(number "$1" $((l2 + 8 * (($2 >> bits) & ((1 << (bits - 3)) - 1)))) 8) & mask))
	echo $((cluster + ($2 & ((1 << bits) - 1))))
}

step "A new image, sealed under a passphrase"
run "(umask 077; echo 'correct horse battery staple' > pass)"
run "nvtool create vm.qcow2 --passphrase-file pass"

step "What the machine's devices remember goes in"
run "nvtool vpd pack nic.pci.jsonc --into vm.qcow2 pci/0000:00:03.0/vpd --passphrase-file pass"
run "nvtool vpd pack nic-eeprom.raw.jsonc --into vm.qcow2 net0/nvm --passphrase-file pass"
run "nvtool put vm.qcow2 tpm-permanent-state tpm2-00.permall --type tpm2-permanent --writer 'swtpm 0.7.1' --passphrase-file pass"
run "nvtool ls vm.qcow2 -l --passphrase-file pass"
run "nvtool info vm.qcow2 --passphrase-file pass"
run "nvtool get vm.qcow2 tpm/permanent --passphrase-file pass | cmp - tpm2-00.permall"
pass "the TPM's state comes back as it was, under its conventional name too"
run "nvtool vpd inspect vm.qcow2 pci/0000:00:03.0/vpd --passphrase-file pass"
run "nvtool vpd verify vm.qcow2 pci/0000:00:03.0/vpd --passphrase-file pass"
pass "the VPD's checksum is right"
run "nvtool vpd pack nic-eeprom.raw.jsonc | cmp - <(nvtool get vm.qcow2 net0/nvm --passphrase-file pass)"
pass "the EEPROM is what its spec says"
run "nvtool check vm.qcow2 --passphrase-file pass"
pass "the check is clean"
[[ $(od -An -v -tx1 vm.qcow2 | tr -d ' \n') != *$(printf NVS0123456789 | od -An -tx1 | tr -d ' \n')* ]] || fail "the serial number is in the image in clear"
pass "the serial number in the VPD isn't in the file in clear"

step "A snapshot; then everything goes wrong"
sums before
run "nvtool snapshot create vm.qcow2 good --passphrase-file pass"
run "head -c 6025 /dev/urandom | nvtool put vm.qcow2 tpm/permanent - --passphrase-file pass"
run "nvtool rm vm.qcow2 net0/nvm --passphrase-file pass"
run "nvtool mv vm.qcow2 pci/0000:00:03.0/vpd pci/0000:00:04.0/vpd --passphrase-file pass"
run "nvtool ls vm.qcow2 --passphrase-file pass"
sums between
! cmp -s before between || fail "nothing was changed"
pass "the blobs are others now"

step "Back to the snapshot"
run "nvtool snapshot revert vm.qcow2 good --passphrase-file pass"
sums after
run "cat after"
run "cmp before after"
pass "every byte of every blob is back"
run "nvtool check vm.qcow2 --passphrase-file pass"
pass "the check is clean"

step "One bit of a copy flips"
chunk=$(chunk_of tpm/permanent)
run "cp vm.qcow2 damaged.qcow2"
at=$(in_file damaged.qcow2 $((chunk + 1234)))
printf '(nvtool map: tpm/permanent begins at byte %d of the disk; its byte 1234 is byte %d of the file)\n' "$chunk" "$at"
flipped=$(printf %02x $(($(number damaged.qcow2 "$at" 1) ^ 1)))
run "printf '\\x$flipped' | dd of=damaged.qcow2 bs=1 seek=$at conv=notrunc status=none"
[[ $(cmp -l vm.qcow2 damaged.qcow2 | wc -l) -eq 1 ]] || fail "more than one byte differs"
refuse 12 "nvtool check damaged.qcow2 --passphrase-file pass"
says 'blob "tpm/permanent"'
pass "check names the damaged blob"
refuse 12 "nvtool check damaged.qcow2"
says 'blob "tpm/permanent"'
pass "and does so without the key"
refuse 12 "nvtool get damaged.qcow2 tpm/permanent -o state.bin --passphrase-file pass"
[[ ! -e state.bin ]] || fail "get made a file of a damaged blob"
pass "no damaged byte is handed out"
run "nvtool get damaged.qcow2 net0/nvm --passphrase-file pass | cmp - <(nvtool get vm.qcow2 net0/nvm --passphrase-file pass)"
pass "the other blobs are still there"

step "Without the right key"
run "sha256sum vm.qcow2 > untouched"
run "(umask 077; echo 'battery staple' > wrong)"
refuse 11 "nvtool get vm.qcow2 tpm/permanent --passphrase-file wrong"
pass "the wrong passphrase is refused"
refuse 11 "nvtool put vm.qcow2 tpm/permanent pass --passphrase-file wrong"
pass "also for writing"
refuse 21 "nvtool get vm.qcow2 tpm/permanent < /dev/null"
pass "no key is refused, and told from the wrong one"
run "nvtool ls vm.qcow2"
pass "but an operator without the key sees what is there"
run "sha256sum -c untouched"
pass "and nothing was changed"

step "Where everything lies"
run "nvtool map vm.qcow2 --passphrase-file pass"
run "nvtool map vm.qcow2 -o map.svg --passphrase-file pass"
[[ $(head -c 200 map.svg) == *'<svg'* ]] || fail "map.svg is no SVG"
pass "the map is drawn, as text and as SVG"

printf '\ndemo: all %d checks passed\n' "$checks"
