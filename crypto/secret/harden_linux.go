package secret

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Harden keeps the process's memory out of core dumps and away from ptrace by
// other processes of the same user (prctl(2), PR_SET_DUMPABLE; setrlimit(2),
// RLIMIT_CORE). It is for commands, early in main: /proc/self belongs to root
// from then on.
func Harden() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("setting RLIMIT_CORE to 0: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("clearing PR_SET_DUMPABLE: %w", err)
	}
	return nil
}

// dup makes a descriptor of our own, because closing an os.File, which its
// finalizer would do too, closes the caller's.
func dup(fd int) (*os.File, error) {
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(own), "secret"), nil
}
