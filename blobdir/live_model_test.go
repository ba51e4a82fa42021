package blobdir_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"nvstore.dev/blobdir"
	"nvstore.dev/image/imagetest"
)

// A livePart is what a blob must be.
type livePart struct {
	data           []byte
	live, attached bool
}

// A liveModel is a store of blobs in chunks and live extents, an emulator that
// writes to those that are attached, and snapshots of the image.
type liveModel struct {
	t     testing.TB
	dev   *imagetest.CrashDevice
	d     *blobdir.Dir
	kind  string
	blobs map[string]livePart
	snaps []liveSnap
}

type liveSnap struct {
	content *imagetest.Content
	blobs   map[string]livePart
}

var liveNames = []string{"a", "b", "c", "d", "e"}

func (m *liveModel) pick(t *rapid.T, want func(livePart) bool) string {
	var names []string
	for _, n := range slices.Sorted(maps.Keys(m.blobs)) {
		if want(m.blobs[n]) {
			names = append(names, n)
		}
	}
	if len(names) == 0 {
		t.Skip("none is so")
	}
	return rapid.SampledFrom(names).Draw(t, "name")
}

func (m *liveModel) bytes(t *rapid.T, n int) []byte {
	return bytes.Repeat([]byte{rapid.Byte().Draw(t, "byte")}, n)
}

var (
	anyPart  = func(livePart) bool { return true }
	attached = func(p livePart) bool { return p.attached }
	detached = func(p livePart) bool { return !p.attached }
	resting  = func(p livePart) bool { return p.live && !p.attached }
)

func (m *liveModel) free(t *rapid.T) string {
	names := slices.DeleteFunc(slices.Clone(liveNames), func(n string) bool { _, ok := m.blobs[n]; return ok })
	if len(names) == 0 {
		t.Skip("no name is free")
	}
	return rapid.SampledFrom(names).Draw(t, "name")
}

func (m *liveModel) actions() map[string]func(*rapid.T) {
	update := func(t *rapid.T, fn func(*blobdir.Tx) error) { require.NoError(t, m.d.Update(fn, nil)) }
	size := rapid.OneOf(rapid.IntRange(1, 20000), rapid.SampledFrom([]int{1, 4095, 4096, 4097, 70000}))
	return map[string]func(*rapid.T){
		"create": func(t *rapid.T) {
			name, data := m.free(t), m.bytes(t, size.Draw(t, "size"))
			require.NoError(t, putLive(m.d, name, data))
			m.blobs[name] = livePart{data: data, live: true}
		},
		"put": func(t *rapid.T) {
			name, data := m.free(t), m.bytes(t, size.Draw(t, "size"))
			require.NoError(t, put(m.d, name, data))
			m.blobs[name] = livePart{data: data}
		},
		"write": func(t *rapid.T) {
			name := m.pick(t, detached)
			p := m.blobs[name]
			data := bytes.Clone(p.data)
			off := rapid.IntRange(0, len(data)-1).Draw(t, "off")
			piece := m.bytes(t, rapid.IntRange(1, len(data)-off).Draw(t, "n"))
			copy(data[off:], piece)
			update(t, func(tx *blobdir.Tx) error { _, err := tx.WriteAt(name, piece, int64(off)); return err })
			m.blobs[name] = livePart{data: data, live: p.live}
		},
		"truncate": func(t *rapid.T) {
			name := m.pick(t, detached)
			data := make([]byte, size.Draw(t, "size"))
			copy(data, m.blobs[name].data)
			update(t, func(tx *blobdir.Tx) error { return tx.Truncate(name, int64(len(data))) })
			m.blobs[name] = livePart{data: data, live: m.blobs[name].live}
		},
		"set live": func(t *rapid.T) {
			name := m.pick(t, detached)
			p := m.blobs[name]
			p.live = !p.live
			update(t, func(tx *blobdir.Tx) error { return tx.SetLive(name, p.live) })
			m.blobs[name] = p
		},
		"rename": func(t *rapid.T) {
			old, name := m.pick(t, anyPart), m.free(t)
			update(t, func(tx *blobdir.Tx) error { return tx.Rename(old, name) })
			m.blobs[name] = m.blobs[old]
			delete(m.blobs, old)
		},
		"delete": func(t *rapid.T) {
			name := m.pick(t, anyPart)
			err := m.d.Update(func(tx *blobdir.Tx) error { return tx.Delete(name) }, nil)
			if m.blobs[name].attached {
				require.ErrorIs(t, err, blobdir.ErrAttached)
				return
			}
			require.NoError(t, err)
			delete(m.blobs, name)
		},
		"attach": func(t *rapid.T) {
			name := m.pick(t, resting)
			require.NoError(t, m.d.Attach(name))
			p := m.blobs[name]
			p.attached = true
			m.blobs[name] = p
		},
		"detach": func(t *rapid.T) {
			name := m.pick(t, attached)
			require.NoError(t, m.d.Detach(name))
			p := m.blobs[name]
			p.attached = false
			m.blobs[name] = p
		},
		"emulator": func(t *rapid.T) {
			name := m.pick(t, attached)
			data := bytes.Clone(m.blobs[name].data)
			off := rapid.IntRange(0, len(data)-1).Draw(t, "off")
			copy(data[off:], m.bytes(t, rapid.IntRange(1, len(data)-off).Draw(t, "n")))
			_, err := m.dev.WriteAt(data, stat(m.t, m.d, name).Offset)
			require.NoError(t, err)
			m.blobs[name] = livePart{data: data, live: true, attached: true}
		},
		"snapshot": func(t *rapid.T) {
			m.snaps = append(m.snaps, liveSnap{m.dev.Snapshot(), maps.Clone(m.blobs)})
		},
		"revert": func(t *rapid.T) {
			if len(m.snaps) == 0 {
				t.Skip("no snapshot")
			}
			s := rapid.SampledFrom(m.snaps).Draw(t, "snapshot")
			m.dev.Revert(s.content)
			m.blobs = maps.Clone(s.blobs)
			require.NoError(t, m.d.Reload())
		},
		"crash": func(t *rapid.T) { // of the process
			m.dev = m.dev.Reopen()
			m.reopen(t)
		},
		"close": func(t *rapid.T) {
			require.NoError(t, m.d.Close())
			m.dev = m.dev.Reopen()
			m.reopen(t)
		},
		"": m.check,
	}
}

func (m *liveModel) reopen(t *rapid.T) {
	d, err := blobdir.Open(m.dev, openOptions(m.t, m.kind))
	require.NoError(t, err)
	m.d = d
}

// check compares all that the store shows.
func (m *liveModel) check(t *rapid.T) {
	require.NoError(t, m.d.View(func(tx *blobdir.Tx) error {
		n := 0
		for e, err := range tx.List("") {
			if err != nil {
				return err
			}
			n++
			p, ok := m.blobs[e.Name]
			if !ok || e.Live != p.live || e.Attached != p.attached || e.Size != int64(len(p.data)) {
				return fmt.Errorf("%q is %+v", e.Name, e)
			}
			got := make([]byte, len(p.data))
			if p.attached {
				if _, err := tx.Get(e.Name, 0); !errors.Is(err, blobdir.ErrAttached) {
					return fmt.Errorf("%q: %v", e.Name, err)
				}
				_, err = tx.Peek(e.Name, got, 0)
			} else {
				_, err = tx.ReadAt(e.Name, got, 0)
			}
			if err != nil {
				return err
			}
			if !bytes.Equal(got, p.data) {
				return fmt.Errorf("%q has other bytes", e.Name)
			}
		}
		if n != len(m.blobs) {
			return fmt.Errorf("%d blobs, want %d", n, len(m.blobs))
		}
		return nil
	}))
}

// TestLiveModel does random operations on blobs in chunks and live extents,
// beside an emulator, snapshots and crashes of the process.
func TestLiveModel(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			rapid.Check(t, func(rt *rapid.T) {
				m := &liveModel{t: t, dev: imagetest.NewCrash(256<<10, nil), kind: kind, blobs: map[string]livePart{}}
				d, err := blobdir.Create(m.dev, createOptions(t, kind))
				require.NoError(rt, err)
				m.d = d
				rt.Repeat(m.actions())
				rep, err := m.d.Check(context.Background(), nil)
				require.NoError(rt, err)
				require.Empty(rt, rep.Errors)
				require.Empty(rt, rep.Leaks)
			})
		})
	}
}
