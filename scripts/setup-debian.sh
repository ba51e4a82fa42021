#!/usr/bin/env bash
# Installs the Debian packages whose programs the tests compare with. Does
# nothing when all are there. Go itself is not among them: see go.mod for the
# version.
set -euo pipefail

packages=(
	bsdextrautils     # hexdump, whose dumps we read
	ca-certificates   # go downloads modules
	cryptsetup-bin    # the judge of LUKS images
	dmidecode         # reads the SMBIOS tables that we make
	dumpasn1          # prints our structures
	edid-decode       # reads the EDIDs that we make
	ethtool           # reads the transceiver EEPROMs that we make
	fio               # a client of our NBD server
	freeipmi-tools    # ipmi-fru reads the FRUs that we make
	fuse3             # unmounts the folders that show blobs
	gcc libc6-dev     # the race detector needs cgo
	gnutls-bin        # the TLS of QEMU, libnbd and nbdkit, as a client and a server
	git               # the mutation runner copies the tree
	i2c-tools         # decode-dimms reads the SPDs that we make
	libtpms0          # the TPM in nvtpm
	libtss2-tcti-mssim0 libtss2-tcti-swtpm0 # how tpm2-tools reach nvtpm
	libubootenv-tool  # fw_printenv reads the environments that we make
	libnbd-bin        # nbdinfo and nbdcopy: clients of our NBD server
	linux-image-cloud-amd64 # a guest with a TPM
	nbdkit            # an NBD server with errors, delays and old protocols
	openssl           # asn1parse
	ovmf              # boots on the UEFI variable stores that we make
	pciutils          # lspci reads the VPD that we make
	python3-libnbd    # nbdsh
	qemu-system-arm   # an AST2600 reads EEPROMs over I2C
	qemu-system-ppc   # SLOF reads the NVRAM that we make
	qemu-system-sparc # its machines make ID PROMs
	qemu-system-x86   # locks, NBD, live snapshots
	qemu-user-static  # runs the arm64 kernels
	qemu-utils        # qemu-img, qemu-io, qemu-nbd
	sqlite3           # a peer in the benchmarks
	strace            # counts what TPMs write, in the benchmarks
	swtpm swtpm-tools # what TPM state is
	tpm2-tools        # commands that nvtpm answers
	u-boot-tools      # mkenvimage makes the same environments
	xxd               # hex dumps that we read
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
