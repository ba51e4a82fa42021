package nvstore_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
	"nvstore.dev/machine"
	"nvstore.dev/nvstore"
)

const (
	adoptDisk  = 3<<20 + 512
	adoptState = 256 << 10
)

// held isn't closed with the image in it.
type held struct{ image.Device }

func (h held) Unwrap() image.Device { return h.Device }
func (held) Close() error           { return nil }

// guestDisk is a qcow2 image as a guest leaves it, and what it reads as.
func guestDisk(t testing.TB, file image.Device, cluster int) (*qcow2.Image, []byte) {
	im, err := qcow2.Create(held{file}, &qcow2.CreateOptions{Size: adoptDisk, ClusterSize: cluster})
	require.NoError(t, err)
	// Something is in the last cluster, up to the last byte.
	for _, off := range []int64{0, 1 << 20, adoptDisk - 5000} {
		_, err = im.WriteAt(bytes.Repeat([]byte("guest"), 1000), off)
		require.NoError(t, err)
	}
	require.NoError(t, im.Sync())
	content := make([]byte, adoptDisk)
	require.NoError(t, image.ReadFull(im, content, 0))
	return im, content
}

// adopted demands that dev is a machine's disk with this content and an empty
// store.
func adopted(t testing.TB, dev image.Device, content []byte, of any) {
	d, err := machine.Open(dev)
	require.NoError(t, err, "%v", of)
	require.Equal(t, int64(adoptDisk), d.Layout().DiskSize)
	requireGuest(t, d, content, of)
	on, err := nvstore.Locate(held{dev}, nvstore.Found)
	require.NoError(t, err)
	s, err := nvstore.OpenDevice(on, &nvstore.Options{Idle: -1})
	require.NoError(t, err, "%v", of)
	list, err := s.List("")
	require.NoError(t, err)
	require.Empty(t, list)
	require.NoError(t, s.Put("a", []byte("content"), nil))
	require.NoError(t, s.Close())
}

func requireGuest(t testing.TB, d *machine.Disk, content []byte, of any) {
	g, err := d.Guest()
	require.NoError(t, err)
	p := make([]byte, g.Size())
	require.NoError(t, image.ReadFull(g, p, 0))
	require.True(t, bytes.Equal(content, p), "the guest's disk: %v", of)
}

// A power cut at any moment of an adoption leaves the image as it was, or a
// machine's disk, or what a second adoption makes one; always with the guest's
// bytes.
func TestAdoptCrash(t *testing.T) {
	for _, cluster := range []int{4096, 64 << 10} {
		file := imagetest.NewCrash(0, nil)
		im, content := guestDisk(t, file, cluster)
		file.Settle()
		o := &nvstore.AdoptOptions{MaxDisk: 8 << 20, State: adoptState}
		_, err := nvstore.Adopt(im, o)
		require.NoError(t, err)
		require.NoError(t, im.Close())
		seen := map[string]int{}
		n := file.Len()
		for at := range n + 1 {
			for s := range file.CrashStates(at, &imagetest.StateConfig{Exhaustive: 3, Samples: imagetest.Scale(3), Seed: uint64(at)}) {
				dev := s.Open()
				im, err := qcow2.Open(held{dev}, nil)
				require.NoError(t, err, "%v", s)
				mark := chain.MarkOf(im)
				seen[string(mark[:min(8, len(mark))])]++
				if mark != chain.MarkMachine {
					require.Less(t, at, n)
					p := make([]byte, adoptDisk)
					require.NoError(t, image.ReadFull(im, p, 0))
					require.True(t, bytes.Equal(content, p), "%v", s)
				}
				switch {
				case mark == chain.Unmarked:
					require.Equal(t, int64(adoptDisk), im.Size(), "%v", s)
					_, err := machine.Open(im)
					require.ErrorIs(t, err, machine.ErrNoLayout)
				case strings.HasPrefix(string(mark), string(chain.MarkAdopting)):
					_, err := nvstore.Locate(im, nvstore.Found)
					require.ErrorIs(t, err, nvstore.ErrAdopting)
					_, err = nvstore.Adopt(im, &nvstore.AdoptOptions{State: adoptState})
					require.NoError(t, err, "%v", s)
				}
				if mark != chain.Unmarked {
					adopted(t, im, content, s)
				}
				res, err := im.Check(context.Background(), nil)
				require.NoError(t, err)
				require.Zero(t, res.Errors, "%v: %v", s, res.Findings)
				require.NoError(t, im.Close())
			}
		}
		t.Logf("clusters of %d: %d operations; states by mark: %v", cluster, n, seen)
		require.Len(t, seen, 3)
	}
}

// An error anywhere leaves the image as it was, or, where nothing can be
// written any more, what a second adoption finishes.
func TestAdoptFault(t *testing.T) {
	undone, finished := 0, 0
	hits := imagetest.EachFault(imagetest.Fault{Mode: imagetest.Fail, Ops: imagetest.OpWrite | imagetest.OpSync | imagetest.OpResize}, func(f imagetest.Fault) int {
		file := imagetest.NewMemory(0)
		im, content := guestDisk(t, file, 64<<10)
		require.NoError(t, im.Close())
		dev := imagetest.NewFault(held{file}, f)
		im, err := qcow2.Open(dev, nil)
		require.NoError(t, err)
		_, err = nvstore.Adopt(im, &nvstore.AdoptOptions{State: adoptState})
		_ = im.Close()
		if dev.Hits() == 0 {
			require.NoError(t, err)
			return 0
		}
		im, e := qcow2.Open(held{file}, nil)
		require.NoError(t, e)
		if err != nil && chain.MarkOf(im) == chain.Unmarked {
			undone++
			require.Equal(t, int64(adoptDisk), im.Size())
		}
		if chain.MarkOf(im) != chain.MarkMachine {
			finished++
			_, err = nvstore.Adopt(im, &nvstore.AdoptOptions{State: adoptState})
			require.NoError(t, err)
		}
		adopted(t, im, content, f)
		require.NoError(t, im.Close())
		return dev.Hits()
	})
	t.Logf("%d faults; %d left the image as it was, %d were finished by a second adoption", hits, undone, finished)
	require.Positive(t, undone)
	require.Greater(t, finished, undone)
}

// A raw image has no mark; an attempt that failed is undone, and after a crash
// the size says where to go on.
func TestAdoptRaw(t *testing.T) {
	dev := imagetest.NewCrash(adoptDisk, nil)
	content := bytes.Repeat([]byte("guest"), adoptDisk/5+1)[:adoptDisk]
	_, err := dev.WriteAt(content, 0)
	require.NoError(t, err)
	require.NoError(t, dev.Sync())
	dev.Settle()
	o := &nvstore.AdoptOptions{State: adoptState}
	_, err = nvstore.Adopt(dev, o)
	require.NoError(t, err)
	o.Disk = adoptDisk
	for at := range dev.Len() + 1 {
		for s := range dev.CrashStates(at, &imagetest.StateConfig{Exhaustive: 3, Samples: imagetest.Scale(3), Seed: uint64(at)}) {
			d := s.Open()
			if _, err := machine.Open(d); err != nil {
				require.Less(t, at, dev.Len())
				_, err := nvstore.Adopt(d, o)
				require.NoError(t, err, "%v", s)
			}
			adopted(t, d, content, s)
		}
	}
}

func TestAdoptRefusals(t *testing.T) {
	file := imagetest.NewMemory(0)
	im, content := guestDisk(t, file, 64<<10)
	for _, o := range []nvstore.AdoptOptions{
		{State: 4096}, {MaxDisk: -1}, {Disk: 100}, {Fixed: true}, {Fixed: true, Disk: 1 << 20}, {Store: nvstore.CreateOptions{SealNames: true}},
	} {
		_, err := nvstore.Adopt(im, &o)
		require.Error(t, err, "%+v", o)
		require.Equal(t, int64(adoptDisk), im.Size())
		require.Equal(t, chain.Unmarked, chain.MarkOf(im), "%+v", o)
	}
	require.NoError(t, im.Snapshots().Create("one"))
	_, err := nvstore.Adopt(im, &nvstore.AdoptOptions{})
	require.ErrorIs(t, err, nvstore.ErrSnapshots)
	_, err = nvstore.Adopt(im, &nvstore.AdoptOptions{Snapshots: true, State: adoptState})
	require.NoError(t, err)
	_, err = nvstore.Adopt(im, &nvstore.AdoptOptions{Snapshots: true})
	require.ErrorIs(t, err, image.ErrExist)
	adopted(t, im, content, nil)
	// Reverted to before, and adopted again.
	require.NoError(t, im.Snapshots().Revert("one"))
	_, err = nvstore.Locate(im, nvstore.Found)
	require.ErrorIs(t, err, machine.ErrNoLayout)
	_, err = nvstore.Adopt(im, &nvstore.AdoptOptions{Snapshots: true, State: adoptState})
	require.NoError(t, err)
	adopted(t, im, content, nil)
	// A mark that lies.
	m := binary.BigEndian.AppendUint64([]byte(chain.MarkAdopting), 1<<40)
	require.NoError(t, chain.SetMark(im, chain.Mark(m)))
	_, err = nvstore.Adopt(im, &nvstore.AdoptOptions{Snapshots: true, State: adoptState})
	require.ErrorIs(t, err, image.ErrCorrupt)
	// A store from the first byte on.
	s, err := nvstore.CreateDevice(imagetest.NewMemory(1<<20), &nvstore.CreateOptions{Idle: -1})
	require.NoError(t, err)
	_, err = nvstore.Adopt(s.Dir().Device(), &nvstore.AdoptOptions{})
	require.ErrorIs(t, err, image.ErrExist)
}
