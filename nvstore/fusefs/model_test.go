package fusefs_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"nvstore.dev/image/imagetest"
	"nvstore.dev/nvstore"
	"nvstore.dev/nvstore/fusefs"
)

// A twin is a mount beside a plain folder. Every operation is done to both, and
// must end the same.
type twin struct {
	t       *rapid.T
	m       *mounted
	plain   string
	handles []*pairOf
}

type pairOf struct{ ours, theirs *os.File }

func (w *twin) both(name string, op func(root string) error) {
	ours, theirs := op(w.m.dir), op(w.plain)
	var a, b syscall.Errno
	errors.As(ours, &a)
	errors.As(theirs, &b)
	if a == syscall.ENOTEMPTY || a == syscall.EEXIST {
		a = syscall.EEXIST // either is allowed by rename(2) and rmdir(2)
	}
	if b == syscall.ENOTEMPTY {
		b = syscall.EEXIST
	}
	if a != b || (ours == nil) != (theirs == nil) {
		w.t.Fatalf("%s: the mount says %v, a plain folder %v", name, ours, theirs)
	}
}

// path draws a path that is there, or one of up to three parts out of few, so
// that they meet.
func (w *twin) path() string {
	if rapid.Bool().Draw(w.t, "there") {
		there := tree(w.t, w.plain)
		if len(there) > 0 {
			return rapid.SampledFrom(there).Draw(w.t, "path")
		}
	}
	parts := rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "ab", "Ω"}), 1, 3).Draw(w.t, "path")
	return strings.Join(parts, "/")
}

func (w *twin) content() []byte {
	n := rapid.SampledFrom([]int{0, 1, 100, 4095, 4096, 4097, 20_000}).Draw(w.t, "length")
	return []byte(strings.Repeat(fmt.Sprint(rapid.IntRange(10, 99).Draw(w.t, "content")), n/2+1)[:n])
}

func (w *twin) ops() map[string]func(*rapid.T) {
	return map[string]func(*rapid.T){
		"write": func(*rapid.T) {
			p, data := w.path(), w.content()
			w.both("write "+p, func(root string) error { return os.WriteFile(filepath.Join(root, p), data, 0o600) })
		},
		"mkdir": func(*rapid.T) {
			p := w.path()
			w.both("mkdir "+p, func(root string) error { return os.Mkdir(filepath.Join(root, p), 0o700) })
		},
		"unlink": func(*rapid.T) {
			p := w.path()
			w.both("unlink "+p, func(root string) error { return syscall.Unlink(filepath.Join(root, p)) })
		},
		"rmdir": func(*rapid.T) {
			p := w.path()
			w.both("rmdir "+p, func(root string) error { return syscall.Rmdir(filepath.Join(root, p)) })
		},
		"rename": func(*rapid.T) {
			p, q := w.path(), w.path()
			w.both("rename "+p+" "+q, func(root string) error {
				return syscall.Rename(filepath.Join(root, p), filepath.Join(root, q))
			})
		},
		"truncate": func(*rapid.T) {
			p, n := w.path(), rapid.Int64Range(0, 10_000).Draw(w.t, "size")
			w.both("truncate "+p, func(root string) error { return os.Truncate(filepath.Join(root, p), n) })
		},
		"open": func(*rapid.T) {
			p := w.path()
			if len(w.handles) >= 4 {
				return
			}
			h := &pairOf{}
			w.both("open "+p, func(root string) (err error) {
				f, err := os.OpenFile(filepath.Join(root, p), os.O_RDWR|os.O_CREATE, 0o600)
				if err == nil && root == w.plain {
					h.theirs = f
				} else if err == nil {
					h.ours = f
				}
				return err
			})
			if h.ours != nil {
				w.handles = append(w.handles, h)
			}
		},
		"pwrite": func(*rapid.T) {
			h, data, off := w.handle(), w.content(), rapid.Int64Range(0, 9000).Draw(w.t, "offset")
			w.both("pwrite", func(root string) error { _, err := h(root).WriteAt(data, off); return err })
		},
		"pread": func(*rapid.T) {
			h, off, n := w.handle(), rapid.Int64Range(0, 9000).Draw(w.t, "offset"), rapid.IntRange(1, 9000).Draw(w.t, "length")
			var got [2][]byte
			i := 0
			w.both("pread", func(root string) error {
				p := make([]byte, n)
				k, err := h(root).ReadAt(p, off)
				got[i] = p[:k]
				i++
				return err
			})
			require.Equal(w.t, got[1], got[0])
		},
		"fsync": func(*rapid.T) {
			h := w.handle()
			w.both("fsync", func(root string) error { return h(root).Sync() })
		},
		"ftruncate": func(*rapid.T) {
			h, n := w.handle(), rapid.Int64Range(0, 10_000).Draw(w.t, "size")
			w.both("ftruncate", func(root string) error { return h(root).Truncate(n) })
		},
		"close": func(*rapid.T) {
			if len(w.handles) > 0 {
				i := rapid.IntRange(0, len(w.handles)-1).Draw(w.t, "handle")
				h := w.handles[i]
				w.handles = slices.Delete(w.handles, i, i+1)
				require.NoError(w.t, h.ours.Close())
				require.NoError(w.t, h.theirs.Close())
			}
		},
		"": func(*rapid.T) { require.Equal(w.t, listing(w.t, w.plain), listing(w.t, w.m.dir)) },
	}
}

// handle draws one of the open files.
func (w *twin) handle() func(root string) *os.File {
	if len(w.handles) == 0 {
		w.t.Skip("nothing is open")
	}
	h := w.handles[rapid.IntRange(0, len(w.handles)-1).Draw(w.t, "handle")]
	return func(root string) *os.File {
		if root == w.plain {
			return h.theirs
		}
		return h.ours
	}
}

// listing is a folder's whole content.
func listing(t rapid.TB, root string) map[string]string {
	all := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		if d.IsDir() {
			all[rel] = "folder"
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		p, err := os.ReadFile(path)
		if int64(len(p)) != info.Size() {
			t.Fatalf("%s has %d bytes, and says %d", rel, len(p), info.Size())
		}
		all[rel] = string(p)
		return err
	})
	require.NoError(t, err)
	return all
}

// The mount is a folder like any other, whatever is done to it; and when it is
// unmounted, the store has what the plain folder has.
func TestModel(t *testing.T) {
	root, dirs := t.TempDir(), 0
	rapid.Check(t, func(rt *rapid.T) {
		dirs++
		w := &twin{t: rt, plain: filepath.Join(root, fmt.Sprint("plain", dirs))}
		w.m = &mounted{dir: filepath.Join(root, fmt.Sprint("mount", dirs)), dev: imagetest.NewCrash(32<<20, nil)}
		require.NoError(rt, os.Mkdir(w.plain, 0o700))
		require.NoError(rt, os.Mkdir(w.m.dir, 0o700))
		var err error
		w.m.store, err = nvstore.CreateDevice(w.m.dev, &nvstore.CreateOptions{Idle: -1})
		require.NoError(rt, err)
		defer w.m.store.Close()
		// Folders that are there because of what is in them.
		for _, name := range []string{"a/b", "ab/a/b", "ab/a/a"} {
			require.NoError(rt, w.m.store.Put(name, []byte(name), nil))
			require.NoError(rt, os.MkdirAll(filepath.Join(w.plain, filepath.Dir(name)), 0o700))
			require.NoError(rt, os.WriteFile(filepath.Join(w.plain, name), []byte(name), 0o600))
		}
		w.m.mount, err = fusefs.New(w.m.dir, w.m.store, nil)
		require.NoError(rt, err)
		defer func() {
			for _, h := range w.handles {
				h.ours.Close()
				h.theirs.Close()
			}
			require.NoError(rt, w.m.mount.Unmount())
			require.NoError(rt, w.m.mount.Wait())
			stored := map[string]string{}
			list, err := w.m.store.List("")
			require.NoError(rt, err)
			for _, e := range list {
				p, err := w.m.store.Get(e.Name)
				require.NoError(rt, err)
				stored[e.Name] = string(p)
			}
			want := listing(rt, w.plain)
			for name, content := range want {
				if info, err := os.Stat(filepath.Join(w.plain, name)); err == nil && info.IsDir() && content == "folder" {
					delete(want, name)
				}
			}
			require.Equal(rt, want, stored)
		}()
		rt.Repeat(w.ops())
	})
}
