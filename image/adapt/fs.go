package adapt

import (
	"io"
	"io/fs"
	"time"

	"nvstore.dev/image"
)

// FS is a file system whose only file is d, for reading. Its files also are
// io.ReaderAt and io.Seeker. name is a name without slashes. The FS doesn't
// close d.
func FS(name string, d image.Device) fs.FS { return oneFile{name, d} }

type oneFile struct {
	name string
	d    image.Device
}

func (f oneFile) Open(name string) (fs.File, error) {
	switch {
	case !fs.ValidPath(name):
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrInvalid}
	case name == ".":
		return &folder{f: f}, nil
	case name == f.name:
		return &file{io.NewSectionReader(f.d, 0, f.d.Size()), info{f.name, f.d.Size(), 0o444}}, nil
	}
	return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
}

type file struct {
	*io.SectionReader
	info info
}

func (f *file) Stat() (fs.FileInfo, error) { return f.info, nil }
func (*file) Close() error                 { return nil }

type folder struct {
	f    oneFile
	read bool
}

func (*folder) Stat() (fs.FileInfo, error) { return info{".", 0, fs.ModeDir | 0o555}, nil }
func (*folder) Close() error               { return nil }

func (*folder) Read([]byte) (int, error) {
	return 0, &fs.PathError{Op: "read", Path: ".", Err: fs.ErrInvalid}
}

func (d *folder) ReadDir(n int) ([]fs.DirEntry, error) {
	if d.read {
		if n > 0 {
			return nil, io.EOF
		}
		return nil, nil
	}
	d.read = true
	return []fs.DirEntry{fs.FileInfoToDirEntry(info{d.f.name, d.f.d.Size(), 0o444})}, nil
}

type info struct {
	name string
	size int64
	mode fs.FileMode
}

func (i info) Name() string      { return i.name }
func (i info) Size() int64       { return i.size }
func (i info) Mode() fs.FileMode { return i.mode }
func (info) ModTime() time.Time  { return time.Time{} }
func (i info) IsDir() bool       { return i.mode.IsDir() }
func (info) Sys() any            { return nil }
