package fusefs

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"nvstore.dev/image"
	"nvstore.dev/nvstore"
)

// Options for New. Nil is the zero value: for reading and writing, for the user
// who mounts.
type Options struct {
	// ReadOnly mounts for reading; a store that was opened so needs it.
	ReadOnly bool

	// AllowOther lets other users in, as far as modes let them. Unless root
	// mounts, /etc/fuse.conf must allow it.
	AllowOther bool
}

// A Mount is a store that is shown as a folder. The store stays the caller's,
// and must not be closed before Wait has returned.
type Mount struct {
	server *fuse.Server
	tree   *tree
	stop   chan struct{}
	done   chan struct{}
	once   sync.Once
	err    error
}

// New mounts a store on a folder. A store with blobs named like folders of
// others, as a beside a/b, fails with image.ErrUnsupported.
func New(dir string, s *nvstore.Store, o *Options) (*Mount, error) {
	if o == nil {
		o = &Options{}
	}
	clash, err := clashes(s)
	if err != nil {
		return nil, err
	}
	if len(clash) > 0 {
		return nil, fmt.Errorf("blobs that are also folders of others, such as %q: %w", clash[0], image.ErrUnsupported)
	}
	t := newTree(s)
	t.readOnly, t.uid, t.gid = o.ReadOnly, uint32(os.Getuid()), uint32(os.Getgid())
	if !o.ReadOnly {
		if err := t.sweep(); err != nil {
			return nil, err
		}
	}
	second := time.Second
	opts := &fs.Options{EntryTimeout: &second, AttrTimeout: &second, UID: t.uid, GID: t.gid,
		RootStableAttr: &fs.StableAttr{Ino: 1}}
	opts.MountOptions = fuse.MountOptions{AllowOther: o.AllowOther, FsName: "nvstore", Name: "nvstore",
		MaxWrite: 1 << 20, DirectMount: true, DisableXAttrs: true,
		Logger:  slog.NewLogLogger(slog.NewTextHandler(io.Discard, nil), slog.LevelError),
		Options: []string{"default_permissions"}}
	if o.ReadOnly {
		opts.MountOptions.Options = append(opts.MountOptions.Options, "ro")
	}
	server, err := fs.Mount(dir, t.dirs[""], opts)
	if err != nil {
		return nil, fmt.Errorf("mounting on %s: %w", dir, plain(err))
	}
	m := &Mount{server: server, tree: t, stop: make(chan struct{}), done: make(chan struct{})}
	go m.run(time.NewTicker(writeback))
	return m, nil
}

// plain takes the trailing newline off what fusermount says.
func plain(err error) error {
	if text := strings.TrimSpace(err.Error()); text != err.Error() {
		return errors.New(text)
	}
	return err
}

// writeback is how long content stays in memory only.
var writeback = 5 * time.Second

func (m *Mount) run(tick *time.Ticker) {
	defer tick.Stop()
	ended := make(chan struct{})
	go func() {
		m.server.Wait()
		close(ended)
	}()
	for {
		select {
		case <-tick.C:
			m.tree.writeBack()
			continue
		case <-ended:
		}
		break
	}
	m.err = m.tree.end()
	close(m.done)
}

// end commits everything, and closes all files that are still open.
func (t *tree) end() error {
	err := t.sync()
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, f := range t.files {
		f.mu.Lock()
		if f.blob != nil {
			if e := f.blob.Close(); !t.readOnly {
				err = errors.Join(err, e)
			}
			f.blob = nil
		}
		f.mu.Unlock()
	}
	if t.readOnly {
		return nil
	}
	return errors.Join(err, t.sweep())
}

// Wait returns when the folder was unmounted, by whomever, and all that was
// written is committed; or says what could not be.
func (m *Mount) Wait() error {
	<-m.done
	return m.err
}

// Unmount asks the kernel to unmount. It fails while programs use the folder.
func (m *Mount) Unmount() error { return m.server.Unmount() }
