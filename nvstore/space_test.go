package nvstore_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/blobdir"
	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/nvstore"
)

// fillUp puts blobs until there is no room, and returns how many there are.
func fillUp(t *testing.T, s *nvstore.Store, size int) int {
	t.Helper()
	for i := 0; ; i++ {
		name := fmt.Sprintf("fill/%04d", i)
		before, err := s.Info()
		require.NoError(t, err)
		err = s.Put(name, fill(size, name), nil)
		if err == nil {
			require.Less(t, i, 4000)
			continue
		}
		require.ErrorIs(t, err, nvstore.ErrNoSpace)
		require.ErrorIs(t, err, image.ErrNoSpace)
		var se *blobdir.SpaceError
		require.ErrorAs(t, err, &se)
		require.Positive(t, se.Missing)
		require.LessOrEqual(t, se.Missing, int64(2*size+64<<10))
		after, err := s.Info()
		require.NoError(t, err)
		require.Equal(t, before, after, "nothing changed")
		absent(t, s, name)
		return i
	}
}

// stillUsable proves a full store right: all is there, and what is deleted
// makes room.
func stillUsable(t *testing.T, p *place, s *nvstore.Store, n, size int) {
	t.Helper()
	require.Greater(t, n, 3)
	for range 2 {
		for i := range n {
			name := fmt.Sprintf("fill/%04d", i)
			get(t, s, name, fill(size, name))
		}
		clean(t, s)
		if p != nil {
			s = p.reopen(t, s)
		}
	}
	// Freed space comes back after two more generations.
	require.NoError(t, s.Delete("fill/0000", "fill/0001"))
	for i := range 3 {
		require.NoError(t, s.Update(func(tx *nvstore.Tx) error { return tx.Put("small", []byte{byte(i)}, nil) }))
	}
	require.NoError(t, s.Put("again", fill(size, "again"), nil))
	get(t, s, "again", fill(size, "again"))
	get(t, s, "fill/0002", fill(size, "fill/0002"))
	clean(t, s)
}

func testFull(t *testing.T, p *place) {
	if p.home.name == "Window" {
		p.at = p.at[:len("driver=raw,offset=16M,size=")] + "1M" + p.at[len("driver=raw,offset=16M,size=64M"):]
	}
	s := p.create(t, func(o *nvstore.CreateOptions) { o.Size, o.MaxSize = 1<<20, 1<<20 })
	n := fillUp(t, s, 64<<10)
	stillUsable(t, p, s, n, 64<<10)
}

func testNoGrow(t *testing.T, p *place) {
	s := p.create(t, func(o *nvstore.CreateOptions) { o.Size = 1 << 20 })
	require.NoError(t, s.Put("x", fill(100, "x"), nil))
	require.NoError(t, s.Close())
	s = p.open(t, func(o *nvstore.Options) { o.NoGrow = true })
	if p.home.name == "Window" {
		return // 64 MiB, and can't grow anyway
	}
	err := s.Put("big", fill(2<<20, "big"), nil)
	require.ErrorIs(t, err, nvstore.ErrNoSpace)
	get(t, s, "x", fill(100, "x"))
	in, err := s.Info()
	require.NoError(t, err)
	require.EqualValues(t, 1<<20, in.Size)
	require.NoError(t, s.Put("y", fill(10000, "y"), nil))
	s = p.reopen(t, s)
	require.NoError(t, s.Put("big", fill(2<<20, "big"), nil), "now it may")
	get(t, s, "big", fill(2<<20, "big"))
}

// Images grow, in steps, and stay what other tools can read.
func TestGrowth(t *testing.T) {
	for _, h := range homes {
		if h.name == "Window" {
			continue
		}
		t.Run(h.name, func(t *testing.T) {
			p := &place{home: h, kind: kinds[1], at: h.location(t, t.TempDir())}
			s := p.create(t, func(o *nvstore.CreateOptions) { o.Size = 1 << 20; o.MaxSize = 40 << 20 })
			last, steps := int64(1<<20), 0
			for i := range 30 {
				name := fmt.Sprint(i)
				require.NoError(t, s.Put(name, fill(1<<20, name), nil))
				in, err := s.Info()
				require.NoError(t, err)
				require.GreaterOrEqual(t, in.Size, last)
				require.LessOrEqual(t, in.Size, int64(40<<20))
				if in.Size > last {
					last, steps = in.Size, steps+1
				}
			}
			require.Less(t, steps, 25, "in steps")
			require.Greater(t, last, int64(30<<20))
			s = p.reopen(t, s)
			for i := range 30 {
				get(t, s, fmt.Sprint(i), fill(1<<20, fmt.Sprint(i)))
			}
			fillUp(t, s, 1<<20)
			require.NoError(t, s.Close())
			if h.name == "QCOW2" || h.name == "QCOW2Small" {
				out, err := exec.Command("qemu-img", "check", p.at).CombinedOutput()
				require.NoError(t, err, "%s", out)
			}
		})
	}
}

// A device of fixed size, as a block device is.
func TestFixedDevice(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			d := imagetest.NewCrash(1<<20, &imagetest.CrashOptions{Fixed: true})
			o := &nvstore.CreateOptions{Idle: -1, SealNames: k.names}
			if k.sealed {
				o.Key = rawKey(t, theKey)
			}
			s, err := nvstore.CreateDevice(d, o)
			require.NoError(t, err)
			n := fillUp(t, s, 64<<10)
			stillUsable(t, nil, s, n, 64<<10)
			require.NoError(t, s.Close())
		})
	}
	_, err := nvstore.CreateDevice(imagetest.NewCrash(100<<10, &imagetest.CrashOptions{Fixed: true}), nil)
	require.ErrorIs(t, err, nvstore.ErrNoSpace)
}

// Create leaves nothing behind when it fails.
func TestCreateFails(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x")
	for _, o := range []nvstore.CreateOptions{
		{SealNames: true}, {MaxSize: 1}, {MaxSize: -1}, {Format: "vmdk"}, {ClusterSize: 5}, {Size: -1}, {Format: "raw", Size: -1},
	} {
		s, err := nvstore.Create(path, &o)
		require.Error(t, err, "%+v", o)
		require.Nil(t, s)
		names, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Empty(t, names, "%+v", o)
	}
	s, err := nvstore.Create("pebble:"+path, &nvstore.CreateOptions{MaxSize: 1})
	mustFail(t, s, err, nvstore.ErrInvalid)
	list, err := nvstore.Machines(path)
	require.NoError(t, err)
	require.Empty(t, list)

	require.NoError(t, os.WriteFile(filepath.Join(dir, "y"), []byte("precious"), 0o600))
	s, err = nvstore.Create(filepath.Join(dir, "y"), nil)
	mustFail(t, s, err, nvstore.ErrExist)
	require.ErrorIs(t, err, os.ErrExist)
	// Nor does a store go where something is.
	require.NoError(t, os.WriteFile(filepath.Join(dir, "z"), fill(1<<20, "z"), 0o600))
	s, err = nvstore.Create(filepath.Join(dir, "z"), &nvstore.CreateOptions{Existing: true, Format: "raw"})
	mustFail(t, s, err, nvstore.ErrExist)
	p, err := os.ReadFile(filepath.Join(dir, "z"))
	require.NoError(t, err)
	require.Equal(t, fill(1<<20, "z"), p)
}

// Every write and Sync of a commit fails once and for ever: the error
// surfaces, the handle is dead, and what is opened again is one of the two
// states.
func TestPoisoned(t *testing.T) {
	for _, k := range kinds[:2] {
		t.Run(k.name, func(t *testing.T) {
			co, oo := &nvstore.CreateOptions{Idle: -1}, &nvstore.Options{Idle: -1}
			if k.sealed {
				co.Key, oo.Key = rawKey(t, theKey), rawKey(t, theKey)
			}
			before, after := fill(20000, "before"), fill(20000, "after")
			for _, mode := range []imagetest.FaultMode{imagetest.Fail, imagetest.FailAfter} {
				runs := imagetest.EachFault(imagetest.Fault{Mode: mode, Ops: imagetest.OpWrite | imagetest.OpSync}, func(f imagetest.Fault) int {
					medium := imagetest.NewCrash(4<<20, nil)
					s, err := nvstore.CreateDevice(medium, co)
					require.NoError(t, err)
					require.NoError(t, s.Put("x", before, nil))
					require.NoError(t, s.Close())
					d := imagetest.NewFault(medium.Reopen(), f)
					s, err = nvstore.OpenDevice(d, oo)
					require.NoError(t, err)
					err = s.Put("x", after, nil)
					if d.Hits() == 0 {
						require.NoError(t, err)
					} else {
						require.ErrorIs(t, err, nvstore.ErrPoisoned)
						require.ErrorIs(t, err, imagetest.ErrInjected)
						require.ErrorIs(t, s.Put("y", nil, nil), nvstore.ErrPoisoned)
						_, err = s.Get("x")
						require.ErrorIs(t, err, nvstore.ErrPoisoned)
						_, err = s.Blob("x", nil)
						require.ErrorIs(t, err, nvstore.ErrPoisoned)
					}
					hits := d.Hits()
					_ = s.Close()
					s, err = nvstore.OpenDevice(medium.PowerCut(nil), oo)
					require.NoError(t, err)
					got, err := s.Get("x")
					require.NoError(t, err)
					if string(got) != string(before) {
						require.Equal(t, after, got)
					} else {
						require.NotZero(t, hits, "an acknowledged put is lost")
					}
					clean(t, s)
					require.NoError(t, s.Close())
					return hits
				})
				require.GreaterOrEqual(t, runs, 3, "extents, root, Sync")
			}
		})
	}
}
