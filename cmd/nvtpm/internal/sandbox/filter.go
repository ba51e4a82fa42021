//go:build amd64 || arm64

package sandbox

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	retAllow = 0x7fff0000 // SECCOMP_RET_ALLOW
	retLog   = 0x7ffc0000 // SECCOMP_RET_LOG
	retErrno = 0x00050000 // SECCOMP_RET_ERRNO
	retKill  = 0x80000000 // SECCOMP_RET_KILL_PROCESS

	setFilter = 1 // SECCOMP_SET_MODE_FILTER
	tsync     = 1 // SECCOMP_FILTER_FLAG_TSYNC

	// Offsets in struct seccomp_data, on little-endian machines.
	offNumber = 0
	offArch   = 4
	offArg0   = 16
	offArg2   = 32
)

// Filter forbids, to all threads of the process, system calls that a TPM has
// no use for: other programs, other processes' memory, mounts, modules, users,
// sockets of other families than unix and the Internet's.
func Filter(action string, r *Report) error {
	var ret uint32
	switch action {
	case None:
		return nil
	case Log:
		ret = retLog
	case Kill:
		ret = retKill
	default:
		return fmt.Errorf("seccomp action %q: none, log or kill is possible", action)
	}
	prog := program(ret)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// Without it, only root may have a filter; with tsync all threads get it.
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	f := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	id, _, e := unix.Syscall(unix.SYS_SECCOMP, setFilter, tsync, uintptr(unsafe.Pointer(&f)))
	runtime.KeepAlive(prog)
	switch {
	case e != 0:
		return fmt.Errorf("seccomp: %w", e)
	case id != 0:
		return errors.New("seccomp: a thread has a filter of its own")
	}
	r.NoNewPrivs, r.Seccomp = true, action
	return nil
}

// program is the filter. Jumps count instructions.
func program(ret uint32) []unix.SockFilter {
	load := func(off uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: off}
	}
	equal := func(v uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: yes, Jf: no, K: v}
	}
	result := func(v uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: v}
	}
	p := []unix.SockFilter{
		load(offArch), equal(arch, 1, 0), result(ret),
		load(offNumber),
		// Numbers above are another interface (x32), past this list.
		{Code: unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K, Jt: 0, Jf: 1, K: x32Bit}, result(ret),
		// The C library asks for clone3 first, whose arguments can't be seen;
		// it does with clone.
		equal(unix.SYS_CLONE3, 0, 1), result(retErrno | uint32(unix.ENOSYS)),
	}
	// A new thread is allowed, a new process isn't.
	p = append(p, equal(unix.SYS_CLONE, 0, 4), load(offArg0),
		unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, Jt: 1, K: unix.CLONE_THREAD}, result(ret), result(retAllow))
	// Of sockets, those; and not MPTCP, which Landlock's ports don't bound. Go
	// goes on with TCP then.
	p = append(p, equal(unix.SYS_SOCKET, 0, 9), load(offArg2), equal(unix.IPPROTO_MPTCP, 0, 1), result(retErrno|uint32(unix.EPROTONOSUPPORT)),
		load(offArg0), equal(unix.AF_UNIX, 3, 0), equal(unix.AF_INET, 2, 0), equal(unix.AF_INET6, 1, 0),
		result(retErrno|uint32(unix.EAFNOSUPPORT)), result(retAllow))
	for _, n := range slices.Concat(forbidden, forbiddenHere) {
		p = append(p, equal(n, 0, 1), result(ret))
	}
	return append(p, result(retAllow))
}

// forbidden are system calls on all machines.
var forbidden = []uint32{
	unix.SYS_ACCT, unix.SYS_ADD_KEY, unix.SYS_ADJTIMEX, unix.SYS_BPF, unix.SYS_CHROOT, unix.SYS_CLOCK_ADJTIME, unix.SYS_CLOCK_SETTIME,
	unix.SYS_DELETE_MODULE, unix.SYS_EXECVE, unix.SYS_EXECVEAT, unix.SYS_FANOTIFY_INIT, unix.SYS_FANOTIFY_MARK,
	unix.SYS_FINIT_MODULE, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSOPEN, unix.SYS_FSPICK, unix.SYS_INIT_MODULE,
	unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER, unix.SYS_IO_URING_SETUP, unix.SYS_KCMP, unix.SYS_KEXEC_LOAD,
	unix.SYS_KEYCTL, unix.SYS_LOOKUP_DCOOKIE, unix.SYS_MIGRATE_PAGES, unix.SYS_MOUNT, unix.SYS_MOUNT_SETATTR,
	unix.SYS_MOVE_MOUNT, unix.SYS_MOVE_PAGES, unix.SYS_NAME_TO_HANDLE_AT, unix.SYS_NFSSERVCTL, unix.SYS_OPEN_BY_HANDLE_AT,
	unix.SYS_OPEN_TREE, unix.SYS_PERF_EVENT_OPEN, unix.SYS_PERSONALITY, unix.SYS_PIDFD_GETFD, unix.SYS_PIVOT_ROOT,
	unix.SYS_PROCESS_MADVISE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PTRACE, unix.SYS_QUOTACTL,
	unix.SYS_REBOOT, unix.SYS_REQUEST_KEY, unix.SYS_SETDOMAINNAME, unix.SYS_SETFSGID, unix.SYS_SETFSUID, unix.SYS_SETGID,
	unix.SYS_SETGROUPS, unix.SYS_SETHOSTNAME, unix.SYS_SETNS, unix.SYS_SETREGID, unix.SYS_SETRESGID, unix.SYS_SETRESUID,
	unix.SYS_SETREUID, unix.SYS_SETTIMEOFDAY, unix.SYS_SETUID, unix.SYS_SWAPOFF, unix.SYS_SWAPON, unix.SYS_SYSLOG,
	unix.SYS_UMOUNT2, unix.SYS_UNSHARE, unix.SYS_USERFAULTFD, unix.SYS_VHANGUP, unix.SYS_VMSPLICE,
}
