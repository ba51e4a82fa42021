package raw

import (
	"io"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

type osFile struct{ *os.File }

// retry runs a system call on the descriptor until no signal interrupts it.
func (f osFile) retry(name string, call func(fd int) error) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = c.Control(func(fd uintptr) {
		for {
			if failed = call(int(fd)); failed != unix.EINTR {
				return
			}
		}
	})
	if err == nil && failed != nil {
		err = &fs.PathError{Op: name, Path: f.Name(), Err: failed}
	}
	return err
}

// WriteAt says how much was written before an error, which os.File's doesn't.
func (f osFile) WriteAt(p []byte, off int64) (int, error) {
	done := 0
	err := f.retry("write", func(fd int) error {
		for done < len(p) {
			n, err := unix.Pwrite(fd, p[done:], off+int64(done))
			if err != nil {
				return err
			}
			if n == 0 {
				return unix.EIO // no progress and no reason
			}
			done += n
		}
		return nil
	})
	return done, err
}

func (f osFile) DataSync() error {
	return f.retry("fdatasync", unix.Fdatasync)
}

func (f osFile) Punch(off, n int64) error {
	return f.retry("fallocate", func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
}

func (f osFile) Zero(off, n int64) error {
	return f.retry("fallocate", func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
}

func (f osFile) Allocate(off, n int64) error {
	return f.retry("fallocate", func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
}

func (f osFile) SeekData(off int64) (int64, error) { return f.seek(off, unix.SEEK_DATA) }
func (f osFile) SeekHole(off int64) (int64, error) { return f.seek(off, unix.SEEK_HOLE) }

// seek moves the file position, which nothing here depends on.
func (f osFile) seek(off int64, whence int) (at int64, err error) {
	err = f.retry("seek", func(fd int) (err error) {
		at, err = unix.Seek(fd, off, whence)
		return err
	})
	return at, err
}

func (f osFile) DropCache() error {
	return f.retry("fadvise", func(fd int) error {
		return unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED)
	})
}

// CopyRange has the kernel copy, by sharing blocks where the file system can.
func (f osFile) CopyRange(off int64, src *os.File, from, n int64) error {
	return osFile{src}.retry("copy_file_range", func(in int) error {
		return f.retry("copy_file_range", func(out int) error {
			for n > 0 {
				k, err := unix.CopyFileRange(in, &from, out, &off, int(min(n, 1<<30)), 0)
				if err != nil {
					return err
				}
				if k == 0 {
					return io.ErrUnexpectedEOF // the source was cut
				}
				n -= int64(k)
			}
			return nil
		})
	})
}

// blockSize is what a discard is trimmed to. Network file systems give their
// transfer size instead.
func blockSize(info fs.FileInfo) int64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Blksize >= 512 && st.Blksize <= 64<<10 {
		return int64(st.Blksize)
	}
	return 4096
}
