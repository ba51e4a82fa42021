// Package control is the control channel of swtpm, by which QEMU, libvirt,
// swtpm_ioctl and tpm2-tss steer a TPM emulator: start, stop, locality,
// measurement of what starts the machine, and state for snapshots and
// migration (swtpm, include/swtpm/tpm_ioctl.h; QEMU, docs/specs/tpm.rst).
//
// A message is a command of 4 bytes and a request that depends on it; the
// reply begins with a result of 4 bytes. All numbers are big-endian. Over a
// unix socket a file descriptor may come along.
package control
