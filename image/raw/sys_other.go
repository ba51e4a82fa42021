//go:build !linux

package raw

import (
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"nvstore.dev/image"
)

// osFile has what Go offers everywhere: no holes, no locks.
type osFile struct{ *os.File }

func (f osFile) DataSync() error { return f.Sync() }

func (f osFile) Punch(off, n int64) error { return syscall.ENOSYS }
func (f osFile) Zero(off, n int64) error  { return syscall.ENOSYS }

func (f osFile) Allocate(off, n int64) error { return syscall.ENOSYS }

func (f osFile) SeekData(off int64) (int64, error) { return 0, syscall.ENOSYS }
func (f osFile) SeekHole(off int64) (int64, error) { return 0, syscall.ENOSYS }

func (f osFile) DropCache() error { return image.ErrUnsupported }

func (f osFile) CopyRange(int64, *os.File, int64, int64) error { return syscall.ENOSYS }

func (f osFile) Lock(readOnly bool) error {
	return fmt.Errorf("locks that QEMU honours: %w", image.ErrUnsupported)
}
func (f osFile) Unlock() error { return nil }

func blockSize(fs.FileInfo) int64 { return 4096 }
