package raw

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"nvstore.dev/image"
)

// QEMU's protocol (7.2, block/file-posix.c and include/block/block-common.h):
// who uses permission i holds a shared lock on byte 100+i, and who doesn't let
// others use it holds one on byte 200+i. The locks never conflict by
// themselves. Having taken its own, each opener looks whether a write lock
// would fail on the bytes that contradict them. Byte 0 is libvirt's.
const (
	usedBase     = 100
	unsharedBase = 200

	permRead   = 0 // QEMU's "consistent read"
	permWrite  = 1
	permResize = 3
)

var permName = [...]string{"consistent read", "write", "write unchanged", "resize"}

// Lock takes what QEMU takes for a qcow2, and for a raw image minus sharing:
// 100, 101, 103, 201, 203 to write; 100, 201, 203 to read.
func (f osFile) Lock(readOnly bool) error {
	used := []int64{permRead, permWrite, permResize}
	if readOnly {
		used = used[:1]
	}
	unshared := []int64{permWrite, permResize}

	err := f.acquire(used, unshared)
	if err != nil {
		_ = f.Unlock()
	}
	return err
}

func (f osFile) acquire(used, unshared []int64) error {
	take := func(base int64, perms []int64) error {
		for _, p := range perms {
			lk := lockAt(unix.F_RDLCK, base+p, 1)
			err := f.fcntl(unix.F_OFD_SETLK, &lk)
			if err == unix.EAGAIN || err == unix.EACCES {
				return f.conflict(base + p)
			}
			if err != nil {
				return fmt.Errorf("lock byte %d: %w", base+p, err)
			}
		}
		return nil
	}
	test := func(base int64, perms []int64) error {
		for _, p := range perms {
			lk := lockAt(unix.F_WRLCK, base+p, 1)
			if err := f.fcntl(unix.F_OFD_GETLK, &lk); err != nil {
				return fmt.Errorf("test lock byte %d: %w", base+p, err)
			}
			if lk.Type != unix.F_UNLCK {
				return f.conflict(base + p)
			}
		}
		return nil
	}
	if err := take(usedBase, used); err != nil {
		return err
	}
	if err := take(unsharedBase, unshared); err != nil {
		return err
	}
	if err := test(unsharedBase, used); err != nil {
		return err
	}
	return test(usedBase, unshared)
}

// Unlock releases whatever this open file holds.
func (f osFile) Unlock() error {
	lk := lockAt(unix.F_UNLCK, 0, 0)
	return f.fcntl(unix.F_OFD_SETLK, &lk)
}

func lockAt(kind int16, off, n int64) unix.Flock_t {
	return unix.Flock_t{Type: kind, Whence: io.SeekStart, Start: off, Len: n}
}

func (f osFile) fcntl(cmd int, lk *unix.Flock_t) (err error) {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if e := c.Control(func(fd uintptr) {
		for {
			if err = unix.FcntlFlock(fd, cmd, lk); err != unix.EINTR {
				return
			}
		}
	}); e != nil {
		return e
	}
	return err
}

// conflict describes who holds a lock byte.
func (f osFile) conflict(at int64) error {
	what := fmt.Sprintf("holds lock byte %d", at)
	switch i := at % 100; {
	case i >= int64(len(permName)):
	case at >= unsharedBase:
		what = fmt.Sprintf("doesn't share %q (lock byte %d)", permName[i], at)
	default:
		what = fmt.Sprintf("uses %q (lock byte %d)", permName[i], at)
	}
	who := f.holder(at)
	if who == "" {
		who = "somebody"
	}
	return fmt.Errorf("%w: %s %s", image.ErrLocked, who, what)
}

// holder looks for the process that holds a lock on a byte of f. /proc/locks
// and F_OFD_GETLK have no process for this kind of lock, but each process's own
// fdinfo lists them. It is for an error message: what it can't see it leaves.
func (f osFile) holder(at int64) string {
	own := -1
	if c, err := f.SyscallConn(); err == nil {
		_ = c.Control(func(n uintptr) { own = int(n) })
	}
	ours, err := identify(fmt.Sprintf("/proc/self/fd/%d", own))
	if err != nil {
		return ""
	}
	self := filepath.Join("/proc", strconv.Itoa(os.Getpid()), "fdinfo")
	dirs, _ := filepath.Glob("/proc/[0-9]*/fdinfo")
	for _, dir := range dirs {
		fds, _ := os.ReadDir(dir)
		for _, fd := range fds {
			text, err := os.ReadFile(filepath.Join(dir, fd.Name()))
			if err != nil || !holds(string(text), at) {
				continue
			}
			if other, err := identify(filepath.Join(filepath.Dir(dir), "fd", fd.Name())); err != nil || other != ours {
				continue
			}
			if dir == self {
				if fd.Name() == strconv.Itoa(own) {
					continue // us, asking
				}
				return "this process"
			}
			name, _ := os.ReadFile(filepath.Join(filepath.Dir(dir), "comm"))
			return fmt.Sprintf("process %s (%s)", filepath.Base(filepath.Dir(dir)), strings.TrimSpace(string(name)))
		}
	}
	return ""
}

// An identity is a file's device and inode.
type identity struct {
	major, minor uint32
	inode        uint64
}

// identify asks no file system that may not answer: among the files that others
// have open there may be some of a dead server.
func identify(path string) (identity, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &st); err != nil {
		return identity{}, err
	}
	return identity{st.Dev_major, st.Dev_minor, st.Ino}, nil
}

// holds tells whether an fdinfo file lists a lock that covers a byte:
//
//	lock:	1: OFDLCK ADVISORY  READ -1 fe:00:9977973 100 101
func holds(fdinfo string, at int64) bool {
	for line := range strings.Lines(fdinfo) {
		w := strings.Fields(line)
		if len(w) != 9 || w[0] != "lock:" {
			continue
		}
		from, err := strconv.ParseInt(w[7], 10, 64)
		if err != nil || from > at {
			continue
		}
		to, err := strconv.ParseInt(w[8], 10, 64)
		if w[8] == "EOF" || err == nil && to >= at {
			return true
		}
	}
	return false
}
