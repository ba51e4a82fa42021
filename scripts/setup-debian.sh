#!/usr/bin/env bash
# Installs the Debian packages whose programs the tests compare with. Does
# nothing when all are there. Go itself is not among them: see go.mod for the
# version.
set -euo pipefail

packages=(
	ca-certificates   # go downloads modules
	cryptsetup-bin    # the judge of LUKS images
	dumpasn1          # prints our structures
	edid-decode       # reads the EDIDs that we make
	freeipmi-tools    # ipmi-fru reads the FRUs that we make
	gcc libc6-dev     # the race detector needs cgo
	git               # the mutation runner copies the tree
	openssl           # asn1parse
	pciutils          # lspci reads the VPD that we make
	qemu-system-x86   # locks, NBD, live snapshots
	qemu-user-static  # runs the arm64 kernels
	qemu-utils        # qemu-img, qemu-io, qemu-nbd
	sqlite3           # a peer in the benchmarks
	swtpm swtpm-tools # what TPM state is
)

if ! command -v dpkg-query >/dev/null; then
	echo "setup: not a Debian system; the tests need: ${packages[*]}" >&2
	exit 0
fi

missing=()
for p in "${packages[@]}"; do
	status=$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true)
	[[ $status == installed ]] || missing+=("$p")
done
if ((${#missing[@]} == 0)); then
	exit 0
fi

sudo=()
if ((EUID != 0)); then
	sudo=(sudo)
fi
echo "setup: installing ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
"${sudo[@]}" apt-get update -qq
"${sudo[@]}" apt-get install -qq -y --no-install-recommends "${missing[@]}"
