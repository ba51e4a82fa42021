package fusefs

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"nvstore.dev/blobdir"
	"nvstore.dev/nvstore"
)

// hidden is where blobs lie that were removed while they were open.
const hidden = ".nvtool-unlinked"

// A tree is the namespace: which folders there are, and which files the kernel
// knows. The lock orders are tree before file, and tree before the store.
type tree struct {
	s        *nvstore.Store
	readOnly bool
	uid, gid uint32
	born     time.Time

	mu    sync.RWMutex // held for writing by what changes names
	files map[[16]byte]*file
	dirs  map[string]*dir
	empty map[string]bool // folders that are there even without blobs
	inode uint64          // of the newest folder
}

func newTree(s *nvstore.Store) *tree {
	t := &tree{s: s, born: time.Now(), files: make(map[[16]byte]*file), dirs: make(map[string]*dir),
		empty: make(map[string]bool), inode: 1 << 48}
	t.dirs[""] = &dir{t: t, ino: 1, attr: attr{mode: 0o700}}
	return t
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "/" + name
}

func parent(path string) string {
	if i := strings.LastIndexByte(path, '/'); i >= 0 {
		return path[:i]
	}
	return ""
}

// check returns EINVAL for a name that can't be.
func check(path string) syscall.Errno {
	if path == hidden || strings.HasPrefix(path, hidden+"/") || blobdir.CheckName(path) != nil {
		return syscall.EINVAL
	}
	return 0
}

// hiddenName returns a new name for a blob that is removed while it is open.
func hiddenName() string {
	p := make([]byte, 16)
	_, _ = rand.Read(p)
	return hidden + "/" + hex.EncodeToString(p)
}

// below tells whether there are blobs in a folder. Needs mu.
func (t *tree) below(path string) (found bool, err error) {
	err = t.s.View(func(tx *nvstore.Tx) error {
		for e, err := range tx.List(path + "/") {
			_ = e
			found = err == nil
			return err
		}
		return nil
	})
	return found, err
}

// isDir needs mu.
func (t *tree) isDir(path string) (bool, error) {
	if path == "" || t.empty[path] {
		return true, nil
	}
	for p := range t.empty {
		if strings.HasPrefix(p, path+"/") {
			return true, nil
		}
	}
	return t.below(path)
}

// keep lets the folders above a path stay when it is gone. Needs mu.
func (t *tree) keep(path string) {
	for p := parent(path); p != ""; p = parent(p) {
		t.empty[p] = true
	}
}

// dirAt returns the node of a folder. Needs mu for writing.
func (t *tree) dirAt(path string) *dir {
	d := t.dirs[path]
	if d == nil {
		t.inode++
		d = &dir{t: t, path: path, ino: t.inode, attr: attr{mode: 0o700}}
		t.dirs[path] = d
	}
	return d
}

// fileOf returns the node of a blob. Needs mu for writing.
func (t *tree) fileOf(e *nvstore.Entry) *file {
	f := t.files[e.ID]
	if f == nil {
		f = &file{t: t, id: e.ID, name: e.Name, attr: attr{mode: 0o600}}
		t.files[e.ID] = f
	}
	return f
}

// inodeOf is a number that follows the blob through renames.
func inodeOf(id [16]byte) uint64 {
	n := uint64(0)
	for _, b := range id[:8] {
		n = n<<8 | uint64(b)
	}
	return n | 1<<62&^(1<<63) // apart from folders, and from go-fuse's own
}

// find returns what a path names: a file, a folder, or ENOENT. Needs mu for
// writing.
func (t *tree) find(path string) (*file, *dir, *nvstore.Entry, syscall.Errno) {
	e, err := t.s.Stat(path)
	if err == nil {
		return t.fileOf(&e), nil, &e, 0
	}
	if !errors.Is(err, nvstore.ErrNotFound) {
		return nil, nil, nil, errno(err)
	}
	is, err := t.isDir(path)
	if err != nil {
		return nil, nil, nil, errno(err)
	}
	if !is {
		return nil, nil, nil, syscall.ENOENT
	}
	return nil, t.dirAt(path), nil, 0
}

// A change is one commit that gives files other names, or none. Files that are
// open let go of their blobs for it: a Blob has one name for life.
type change struct {
	t     *tree
	held  []*file
	steps []func(tx *nvstore.Tx) error
	names map[*file]string // in the end
}

func (t *tree) change() *change { return &change{t: t, names: make(map[*file]string)} }

func (c *change) rename(f *file, to string) {
	from := f.name
	if n, ok := c.names[f]; ok {
		from = n
	} else {
		c.held = append(c.held, f)
	}
	c.names[f] = to
	c.steps = append(c.steps, func(tx *nvstore.Tx) error { return tx.Rename(from, to) })
}

// remove deletes a blob, or hides it while it is open.
func (c *change) remove(f *file) {
	if f.opens > 0 {
		c.rename(f, hiddenName())
		return
	}
	name := f.name
	c.steps = append(c.steps, func(tx *nvstore.Tx) error { return tx.Delete(name) })
}

// commit makes the change. Needs the tree's mu for writing.
func (c *change) commit() error {
	for _, f := range c.held {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.blob == nil {
			continue
		}
		if err := f.blob.Sync(); err != nil {
			return err
		}
	}
	err := c.t.s.Update(func(tx *nvstore.Tx) error {
		for _, step := range c.steps {
			if err := step(tx); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, f := range c.held {
		f.name = c.names[f]
		if f.blob == nil {
			continue
		}
		_ = f.blob.Close() // nothing was written since the Sync: we hold mu
		if f.blob, err = c.t.s.Blob(f.name, nil); err != nil {
			f.lost = err
		}
	}
	return nil
}

// move gives folders below a path their new paths. Needs mu for writing.
func (t *tree) move(from, to string) {
	moved := func(p string) (string, bool) {
		if p == from || strings.HasPrefix(p, from+"/") {
			return to + p[len(from):], true
		}
		return p, false
	}
	empty, dirs := make(map[string]bool), make(map[string]*dir)
	for p := range t.empty {
		p, _ = moved(p)
		empty[p] = true
	}
	for p, d := range t.dirs {
		n, is := moved(p)
		if !is && (p == to || strings.HasPrefix(p, to+"/")) {
			d.gone = true // it was empty, and is replaced
			continue
		}
		d.path = n
		dirs[n] = d
	}
	t.empty, t.dirs = empty, dirs
}

// sweep removes what a crash left of files that were removed while open.
func (t *tree) sweep() error {
	list, err := t.s.List(hidden + "/")
	if err != nil || len(list) == 0 {
		return err
	}
	names := make([]string, 0, len(list))
	for _, e := range list {
		names = append(names, e.Name)
	}
	return t.s.Delete(names...)
}

// clashes returns blobs whose names are also folders' names, which a tree
// can't show.
func clashes(s *nvstore.Store) (list []string, err error) {
	err = s.View(func(tx *nvstore.Tx) error {
		var names []string
		for e, err := range tx.List("") {
			if err != nil {
				return err
			}
			names = append(names, e.Name)
		}
		slices.Sort(names)
		for _, name := range names {
			i, _ := slices.BinarySearch(names, name+"/")
			if i < len(names) && strings.HasPrefix(names[i], name+"/") {
				list = append(list, name)
			}
		}
		return nil
	})
	return list, err
}

// sync commits what was written to all files.
func (t *tree) sync() error {
	t.mu.RLock()
	var open []*file
	for _, f := range t.files {
		if f.opens > 0 {
			open = append(open, f)
		}
	}
	t.mu.RUnlock()
	errs := make([]error, len(open))
	var wg sync.WaitGroup
	for i, f := range open {
		wg.Go(func() { errs[i] = f.commit() })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// writeBack is sync where nobody waits. The next fsync or close of a file says
// what went wrong.
func (t *tree) writeBack() {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, f := range t.files {
		if f.opens == 0 {
			continue
		}
		if err := f.commit(); err != nil {
			f.attrMu.Lock()
			f.missed = err
			f.attrMu.Unlock()
		}
	}
}
