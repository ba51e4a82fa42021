package sandbox

import "golang.org/x/sys/unix"

const (
	arch   = unix.AUDIT_ARCH_X86_64
	x32Bit = 0x40000000 // __X32_SYSCALL_BIT
)

// forbiddenHere are system calls of this machine alone.
var forbiddenHere = []uint32{
	unix.SYS_CREATE_MODULE, unix.SYS_FORK, unix.SYS_GET_KERNEL_SYMS, unix.SYS_IOPERM, unix.SYS_IOPL, unix.SYS_KEXEC_FILE_LOAD,
	unix.SYS_MODIFY_LDT, unix.SYS_QUERY_MODULE, unix.SYS_SYSFS, unix.SYS__SYSCTL, unix.SYS_USELIB, unix.SYS_USTAT, unix.SYS_VFORK,
}
