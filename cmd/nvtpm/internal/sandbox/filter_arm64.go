package sandbox

import "golang.org/x/sys/unix"

const (
	arch   = unix.AUDIT_ARCH_AARCH64
	x32Bit = 1 << 31 // there is no such interface
)

// forbiddenHere are system calls of this machine alone.
var forbiddenHere = []uint32{unix.SYS_KEXEC_FILE_LOAD}
