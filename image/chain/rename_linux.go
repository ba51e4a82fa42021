package chain

import "golang.org/x/sys/unix"

// rename refuses to replace what is there.
func rename(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if err == unix.EINVAL || err == unix.ENOSYS || err == unix.ENOTSUP {
		return linkOver(from, to)
	}
	return err
}
