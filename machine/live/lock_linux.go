package live

import (
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// lockByte locks a byte of a file, or unlocks it, without waiting.
func lockByte(f *os.File, at int64, how int) error {
	kind := map[int]int16{unlocked: unix.F_UNLCK, shared: unix.F_RDLCK, exclusive: unix.F_WRLCK}[how]
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := c.Control(func(fd uintptr) {
		lk := unix.Flock_t{Type: kind, Whence: io.SeekStart, Start: at, Len: 1}
		for {
			if err = unix.FcntlFlock(fd, unix.F_OFD_SETLK, &lk); err != unix.EINTR {
				return
			}
		}
	}); cerr != nil {
		return cerr
	}
	if err == unix.EAGAIN || err == unix.EACCES {
		return errTaken
	}
	return err
}
