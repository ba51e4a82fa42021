package fusefs

import (
	"context"
	"errors"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"nvstore.dev/nvstore"
)

// attr is what is said of a file or folder beside its content, and lasts as
// long as the mount.
type attr struct {
	mode     uint32 // permissions
	owner    *fuse.Owner
	modified time.Time // if it was set
}

// set takes what a SETATTR says.
func (a *attr) set(in *fuse.SetAttrIn, t *tree) {
	if m, ok := in.GetMode(); ok {
		a.mode = m & 0o7777
	}
	uid, hasUID := in.GetUID()
	gid, hasGID := in.GetGID()
	if hasUID || hasGID {
		o := a.ownedBy(t)
		if hasUID {
			o.Uid = uid
		}
		if hasGID {
			o.Gid = gid
		}
		a.owner = &o
	}
	if m, ok := in.GetMTime(); ok {
		a.modified = m
	}
}

func (a *attr) ownedBy(t *tree) fuse.Owner {
	if a.owner != nil {
		return *a.owner
	}
	return fuse.Owner{Uid: t.uid, Gid: t.gid}
}

func (a *attr) fill(out *fuse.Attr, t *tree, modified time.Time) {
	out.Mode |= a.mode
	out.Owner = a.ownedBy(t)
	if !a.modified.IsZero() {
		modified = a.modified
	}
	out.SetTimes(&modified, &modified, &modified)
	out.Blksize, out.Nlink = 4096, 1 // no links: the kernel takes 0 for removed
}

// A dir is a folder. path and gone are under the tree's mu.
type dir struct {
	fs.Inode
	t    *tree
	path string
	ino  uint64
	gone bool
	attr attr
}

var _ interface {
	fs.NodeLookuper
	fs.NodeReaddirer
	fs.NodeGetattrer
	fs.NodeSetattrer
	fs.NodeCreater
	fs.NodeMknoder
	fs.NodeMkdirer
	fs.NodeUnlinker
	fs.NodeRmdirer
	fs.NodeRenamer
	fs.NodeFsyncer
	fs.NodeStatfser
} = (*dir)(nil)

// at returns the path of a name in the folder. Needs mu.
func (d *dir) at(name string) (string, syscall.Errno) {
	if d.gone {
		return "", syscall.ENOENT
	}
	return join(d.path, name), 0
}

func (d *dir) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	d.t.mu.Lock()
	defer d.t.mu.Unlock()
	path, no := d.at(name)
	if no != 0 {
		return nil, no
	}
	if check(path) != 0 {
		return nil, syscall.ENOENT
	}
	f, sub, e, no := d.t.find(path)
	switch {
	case no != 0:
		return nil, no
	case f != nil:
		return d.fileNode(ctx, f, e, out), 0
	}
	return d.dirNode(ctx, sub, out), 0
}

func (d *dir) fileNode(ctx context.Context, f *file, e *nvstore.Entry, out *fuse.EntryOut) *fs.Inode {
	f.fill(e, &out.Attr)
	return d.NewInode(ctx, f, fs.StableAttr{Mode: syscall.S_IFREG, Ino: inodeOf(f.id)})
}

func (d *dir) dirNode(ctx context.Context, sub *dir, out *fuse.EntryOut) *fs.Inode {
	sub.attr.fill(&out.Attr, d.t, d.t.born)
	return d.NewInode(ctx, sub, fs.StableAttr{Mode: syscall.S_IFDIR, Ino: sub.ino})
}

func (d *dir) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	d.t.mu.Lock()
	defer d.t.mu.Unlock()
	if d.gone {
		return fs.NewListDirStream(nil), 0
	}
	prefix := ""
	if d.path != "" {
		prefix = d.path + "/"
	}
	found := make(map[string]fuse.DirEntry)
	err := d.t.s.View(func(tx *nvstore.Tx) error {
		for e, err := range tx.List(prefix) {
			if err != nil {
				return err
			}
			name, _, more := strings.Cut(e.Name[len(prefix):], "/")
			if !more {
				found[name] = fuse.DirEntry{Name: name, Mode: syscall.S_IFREG, Ino: inodeOf(e.ID)}
			} else if _, ok := found[name]; !ok && prefix+name != hidden {
				found[name] = fuse.DirEntry{Name: name, Mode: syscall.S_IFDIR, Ino: d.t.dirAt(prefix + name).ino}
			}
		}
		return nil
	})
	if err != nil {
		return nil, errno(err)
	}
	for p := range d.t.empty {
		if rest, ok := strings.CutPrefix(p, prefix); ok {
			name, _, _ := strings.Cut(rest, "/")
			found[name] = fuse.DirEntry{Name: name, Mode: syscall.S_IFDIR, Ino: d.t.dirAt(prefix + name).ino}
		}
	}
	list := make([]fuse.DirEntry, 0, len(found))
	for _, e := range found {
		list = append(list, e)
	}
	slices.SortFunc(list, func(a, b fuse.DirEntry) int { return strings.Compare(a.Name, b.Name) })
	return fs.NewListDirStream(list), 0
}

func (d *dir) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	d.t.mu.RLock()
	defer d.t.mu.RUnlock()
	out.Mode = syscall.S_IFDIR
	d.attr.fill(&out.Attr, d.t, d.t.born)
	return 0
}

func (d *dir) Setattr(_ context.Context, _ fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if d.t.readOnly {
		return syscall.EROFS
	}
	d.t.mu.Lock()
	defer d.t.mu.Unlock()
	d.attr.set(in, d.t)
	out.Mode = syscall.S_IFDIR
	d.attr.fill(&out.Attr, d.t, d.t.born)
	return 0
}

// make makes an empty blob. Needs mu for writing.
func (d *dir) make(path string, mode uint32) (*file, *nvstore.Entry, syscall.Errno) {
	if no := check(path); no != 0 {
		return nil, nil, no
	}
	if is, err := d.t.isDir(path); err != nil {
		return nil, nil, errno(err)
	} else if is {
		return nil, nil, syscall.EEXIST
	}
	if err := d.t.s.Update(func(tx *nvstore.Tx) error { return tx.Create(path, &nvstore.Meta{}) }); err != nil {
		return nil, nil, errno(err)
	}
	e, err := d.t.s.Stat(path)
	if err != nil {
		return nil, nil, errno(err)
	}
	f := d.t.fileOf(&e)
	f.attr.mode = mode & 0o7777
	return f, &e, 0
}

func (d *dir) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	d.t.mu.Lock()
	defer d.t.mu.Unlock()
	path, no := d.at(name)
	if no != 0 {
		return nil, nil, 0, no
	}
	f, e, no := d.make(path, mode)
	if no == syscall.EEXIST && flags&syscall.O_EXCL == 0 {
		f, _, e, no = d.t.find(path) // somebody was faster
		if f == nil && no == 0 {
			no = syscall.EISDIR
		}
	}
	if no != 0 {
		return nil, nil, 0, no
	}
	if no := f.open(); no != 0 {
		return nil, nil, 0, no
	}
	return d.fileNode(ctx, f, e, out), &handle{f}, 0, 0
}

func (d *dir) Mknod(ctx context.Context, name string, mode, _ uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if mode&syscall.S_IFMT != syscall.S_IFREG {
		return nil, syscall.EPERM
	}
	d.t.mu.Lock()
	defer d.t.mu.Unlock()
	path, no := d.at(name)
	if no != 0 {
		return nil, no
	}
	f, e, no := d.make(path, mode)
	if no != 0 {
		return nil, no
	}
	return d.fileNode(ctx, f, e, out), 0
}

func (d *dir) Mkdir(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	d.t.mu.Lock()
	defer d.t.mu.Unlock()
	path, no := d.at(name)
	if no != 0 {
		return nil, no
	}
	// A blob below it needs two bytes more.
	if no := check(path); no != 0 || check(path+"/x") != 0 {
		return nil, syscall.EINVAL
	}
	if _, _, _, no := d.t.find(path); no != syscall.ENOENT {
		if no == 0 {
			no = syscall.EEXIST
		}
		return nil, no
	}
	d.t.empty[path] = true
	delete(d.t.dirs, path)
	sub := d.t.dirAt(path)
	sub.attr.mode = mode & 0o7777
	return d.dirNode(ctx, sub, out), 0
}

func (d *dir) Unlink(_ context.Context, name string) syscall.Errno {
	d.t.mu.Lock()
	defer d.t.mu.Unlock()
	path, no := d.at(name)
	if no != 0 {
		return no
	}
	f, _, _, no := d.t.find(path)
	if no == 0 && f == nil {
		no = syscall.EISDIR
	}
	if no != 0 {
		return no
	}
	c := d.t.change()
	c.remove(f)
	if err := c.commit(); err != nil {
		return errno(err)
	}
	d.t.keep(path)
	return 0
}

func (d *dir) Rmdir(_ context.Context, name string) syscall.Errno {
	d.t.mu.Lock()
	defer d.t.mu.Unlock()
	path, no := d.at(name)
	if no != 0 {
		return no
	}
	f, sub, _, no := d.t.find(path)
	if f != nil {
		return syscall.ENOTDIR
	}
	if no != 0 {
		return no
	}
	if no := d.t.vacant(path); no != 0 {
		return no
	}
	d.t.keep(path)
	delete(d.t.empty, path)
	delete(d.t.dirs, path)
	sub.gone = true
	return 0
}

// vacant returns ENOTEMPTY for a folder that isn't empty. Needs mu.
func (t *tree) vacant(path string) syscall.Errno {
	for p := range t.empty {
		if strings.HasPrefix(p, path+"/") {
			return syscall.ENOTEMPTY
		}
	}
	found, err := t.below(path)
	if err != nil {
		return errno(err)
	}
	if found {
		return syscall.ENOTEMPTY
	}
	return 0
}

const renameNoReplace = 1 // RENAME_NOREPLACE, renameat2(2)

func (d *dir) Rename(_ context.Context, name string, newParent fs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	to, ok := newParent.(*dir)
	if !ok {
		return syscall.ENOTDIR
	}
	if flags&^uint32(renameNoReplace) != 0 {
		return syscall.EINVAL
	}
	d.t.mu.Lock()
	defer d.t.mu.Unlock()
	from, no := d.at(name)
	if no != 0 {
		return no
	}
	target, no := to.at(newName)
	if no != 0 {
		return no
	}
	if no := check(target); no != 0 {
		return no
	}
	f, sub, _, no := d.t.find(from)
	if no != 0 {
		return no
	}
	over, overDir, _, no := d.t.find(target)
	switch {
	case no != 0 && no != syscall.ENOENT:
		return no
	case no == 0 && flags&renameNoReplace != 0:
		return syscall.EEXIST
	case from == target:
		return 0
	case sub != nil:
		return d.t.renameDir(sub.path, target, over, overDir)
	case overDir != nil:
		return syscall.EISDIR
	}
	c := d.t.change()
	if over != nil {
		c.remove(over)
	}
	c.rename(f, target)
	if err := c.commit(); err != nil {
		return errno(err)
	}
	d.t.keep(from)
	return 0
}

// renameDir renames all blobs below a folder, in one commit. Needs mu for
// writing.
func (t *tree) renameDir(from, to string, over *file, overDir *dir) syscall.Errno {
	if over != nil {
		return syscall.ENOTDIR
	}
	if strings.HasPrefix(to, from+"/") {
		return syscall.EINVAL
	}
	if overDir != nil {
		if no := t.vacant(to); no != 0 {
			return no
		}
	}
	list, err := t.s.List(from + "/")
	if err != nil {
		return errno(err)
	}
	c := t.change()
	for i := range list {
		name := to + list[i].Name[len(from):]
		if no := check(name); no != 0 {
			return no
		}
		c.rename(t.fileOf(&list[i]), name)
	}
	if len(list) > 0 {
		if err := c.commit(); err != nil {
			return errno(err)
		}
	}
	t.keep(from)
	t.empty[from] = true // so that it moves even if nothing is in it
	delete(t.empty, to)
	t.move(from, to)
	return 0
}

// Fsync of a folder has nothing to do: names are durable at once.
func (d *dir) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno { return 0 }

func (d *dir) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno { return d.t.statfs(out) }

func (t *tree) statfs(out *fuse.StatfsOut) syscall.Errno {
	info, err := t.s.Info()
	if err != nil {
		return errno(err)
	}
	const block = 4096
	free := info.Free
	if room := info.MaxSize - info.Size; info.MaxSize > 0 && room > 0 {
		free += room
	} else if info.MaxSize == 0 {
		free = max(free, 1<<40-info.Used) // it grows
	}
	out.Bsize, out.Frsize, out.NameLen = block, block, 255
	out.Blocks, out.Bfree = uint64((info.Used+free)/block), uint64(free/block)
	out.Bavail = out.Bfree
	out.Files, out.Ffree = uint64(info.Blobs), 1<<20
	return 0
}

// errno says an error in the kernel's words.
func errno(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	for _, k := range []struct {
		kind error
		no   syscall.Errno
	}{
		{nvstore.ErrNotFound, syscall.ENOENT}, {nvstore.ErrExist, syscall.EEXIST}, {nvstore.ErrNoSpace, syscall.ENOSPC},
		{nvstore.ErrReadOnly, syscall.EROFS}, {nvstore.ErrInvalid, syscall.EINVAL}, {nvstore.ErrClosed, syscall.ENODEV},
		{nvstore.ErrAttached, syscall.EBUSY},
	} {
		if errors.Is(err, k.kind) {
			return k.no
		}
	}
	return syscall.EIO
}
