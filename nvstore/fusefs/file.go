package fusefs

import (
	"context"
	"errors"
	"io"
	"math"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"nvstore.dev/nvstore"
)

// A file is a blob, as long as the kernel knows it. name and opens are under
// the tree's mu; name and blob also under mu, which is held for reading by
// whoever uses the blob.
type file struct {
	fs.Inode
	t  *tree
	id [16]byte

	mu    sync.RWMutex
	name  string
	blob  *nvstore.Blob // while it is open
	lost  error         // why it isn't, in spite of opens
	opens int

	attrMu sync.Mutex
	attr   attr
	wrote  time.Time // last write by us, until it is committed
	missed error     // of a commit that nobody waited for
}

var _ interface {
	fs.NodeGetattrer
	fs.NodeSetattrer
	fs.NodeOpener
	fs.NodeFsyncer
	fs.NodeStatfser
	fs.NodeOnForgetter
} = (*file)(nil)

// OnForget lets go of the node when the kernel does.
func (f *file) OnForget() {
	f.t.mu.Lock()
	defer f.t.mu.Unlock()
	if f.t.files[f.id] == f && f.opens == 0 {
		delete(f.t.files, f.id)
	}
}

// fill says what is known of the file; e is its entry.
func (f *file) fill(e *nvstore.Entry, out *fuse.Attr) {
	size := e.Size
	if f.blob != nil {
		size = f.blob.Size()
	}
	out.Size = uint64(size)
	out.Blocks = uint64(size+511) / 512
	f.attrMu.Lock()
	defer f.attrMu.Unlock()
	modified := e.Modified
	if f.wrote.After(modified) {
		modified = f.wrote
	}
	f.attr.fill(out, f.t, modified)
}

func (f *file) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	f.mu.RLock()
	defer f.mu.RUnlock()
	e, err := f.t.s.Stat(f.name)
	if err != nil {
		return errno(err)
	}
	out.Mode = syscall.S_IFREG
	f.fill(&e, &out.Attr)
	return 0
}

func (f *file) Setattr(ctx context.Context, h fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if f.t.readOnly {
		return syscall.EROFS
	}
	if size, ok := in.GetSize(); ok {
		if no := f.resize(size); no != 0 {
			return no
		}
	}
	f.attrMu.Lock()
	f.attr.set(in, f.t)
	f.attrMu.Unlock()
	return f.Getattr(ctx, h, out)
}

// resize changes the size; of a file that nobody has open, at once for good.
func (f *file) resize(size uint64) syscall.Errno {
	if size > math.MaxInt64 {
		return syscall.EFBIG
	}
	f.t.mu.Lock()
	no := f.open()
	f.t.mu.Unlock()
	if no != 0 {
		return no
	}
	err := f.use(func(b *nvstore.Blob) error { return b.Truncate(int64(size)) })
	f.touch()
	return errno(errors.Join(err, f.release()))
}

// touch notes a change that the store doesn't know yet.
func (f *file) touch() {
	f.attrMu.Lock()
	defer f.attrMu.Unlock()
	f.wrote, f.attr.modified = time.Now(), time.Time{}
}

// use calls fn with the blob.
func (f *file) use(fn func(*nvstore.Blob) error) error {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.blob == nil {
		return errors.Join(f.lost, nvstore.ErrClosed)
	}
	return fn(f.blob)
}

// commit commits what was written. It also says what went wrong when nobody
// waited.
func (f *file) commit() error {
	err := f.use((*nvstore.Blob).Sync)
	f.attrMu.Lock()
	missed := f.missed
	f.missed = nil
	f.attrMu.Unlock()
	if missed != nil {
		return missed
	}
	if f.t.readOnly || errors.Is(err, nvstore.ErrClosed) {
		return nil
	}
	return err
}

// open counts one more user. Needs the tree's mu for writing.
func (f *file) open() syscall.Errno {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.blob == nil {
		b, err := f.t.s.Blob(f.name, nil)
		if err != nil {
			return errno(err)
		}
		f.blob, f.lost = b, nil
	}
	f.opens++
	return 0
}

// release counts one less. The last commits what was written.
func (f *file) release() (err error) {
	f.t.mu.Lock()
	defer f.t.mu.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.opens--; f.opens > 0 || f.blob == nil {
		return nil
	}
	gone := check(f.name) != 0
	if gone {
		// No matter what was written.
		err = f.t.s.Delete(f.name)
	} else if err = f.blob.Close(); f.t.readOnly {
		err = nil
	}
	f.blob = nil
	return err
}

func (f *file) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if f.t.readOnly && flags&syscall.O_ACCMODE != syscall.O_RDONLY {
		return nil, 0, syscall.EROFS
	}
	f.t.mu.Lock()
	no := f.open()
	f.t.mu.Unlock()
	if no != 0 {
		return nil, 0, no
	}
	h := &handle{f}
	if flags&syscall.O_TRUNC != 0 {
		if err := f.use(func(b *nvstore.Blob) error { return b.Truncate(0) }); err != nil {
			return nil, 0, errno(errors.Join(err, f.release()))
		}
		f.touch()
	}
	return h, 0, 0
}

func (f *file) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno { return errno(f.commit()) }

func (f *file) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno { return f.t.statfs(out) }

// A handle is a file that somebody has open.
type handle struct{ f *file }

var _ interface {
	fs.FileReader
	fs.FileWriter
	fs.FileFlusher
	fs.FileReleaser
	fs.FileAllocater
} = (*handle)(nil)

func (h *handle) Read(_ context.Context, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n := 0
	err := h.f.use(func(b *nvstore.Blob) (err error) {
		n, err = b.ReadAt(p, off)
		return err
	})
	if err != nil && err != io.EOF {
		return nil, errno(err)
	}
	return fuse.ReadResultData(p[:n]), 0
}

func (h *handle) Write(_ context.Context, p []byte, off int64) (uint32, syscall.Errno) {
	n := 0
	err := h.f.use(func(b *nvstore.Blob) (err error) {
		n, err = b.WriteAt(p, off)
		return err
	})
	h.f.touch()
	if errors.Is(err, nvstore.ErrInvalid) {
		return 0, syscall.EFBIG
	}
	return uint32(n), errno(err)
}

// Flush is a close(2): the last chance to say that something went wrong.
func (h *handle) Flush(context.Context) syscall.Errno { return errno(h.f.commit()) }

func (h *handle) Release(context.Context) syscall.Errno { return errno(h.f.release()) }

const (
	keepSize  = 0x01 // FALLOC_FL_KEEP_SIZE, fallocate(2)
	punchHole = 0x02
	zeroRange = 0x10
)

// Allocate extends the file, or zeroes a part of it. Space isn't reserved.
func (h *handle) Allocate(_ context.Context, off, n uint64, mode uint32) syscall.Errno {
	if off > math.MaxInt64 || n > math.MaxInt64-off {
		return syscall.EFBIG
	}
	lo, hi := int64(off), int64(off+n)
	err := h.f.use(func(b *nvstore.Blob) error {
		size := b.Size()
		switch mode {
		case keepSize:
			return nil
		case 0:
		case punchHole | keepSize, zeroRange | keepSize, zeroRange:
			if err := zero(b, lo, min(hi, size)); err != nil || mode != zeroRange {
				return err
			}
		default:
			return syscall.EOPNOTSUPP
		}
		if hi > size {
			return b.Truncate(hi)
		}
		return nil
	})
	if err == syscall.EOPNOTSUPP {
		return syscall.EOPNOTSUPP
	}
	h.f.touch()
	return errno(err)
}

func zero(b *nvstore.Blob, lo, hi int64) error {
	nulls := make([]byte, max(0, min(hi-lo, 64<<10)))
	for lo < hi {
		n := min(hi-lo, int64(len(nulls)))
		if _, err := b.WriteAt(nulls[:n], lo); err != nil {
			return err
		}
		lo += n
	}
	return nil
}
