package machine_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/machine"
)

func plan(t testing.TB, o machine.Options) *machine.Layout {
	t.Helper()
	l, err := machine.Plan(&o)
	require.NoError(t, err)
	return l
}

func TestPlan(t *testing.T) {
	l := plan(t, machine.Options{Disk: 20 << 30, MaxDisk: 16 << 40})
	require.Equal(t, int64(16<<40), l.MaxDisk())
	require.Equal(t, int64(16<<40+64<<20+128<<10), l.ImageSize)
	require.NotZero(t, l.Machine)
	require.NotEqual(t, l.Machine, plan(t, machine.Options{}).Machine)
	l = plan(t, machine.Options{Disk: 512})
	require.Equal(t, int64(2*mib), l.MaxDisk(), "no cluster is shared")
	l = plan(t, machine.Options{Disk: 512, State: 256 << 10, ImageSize: 3 * mib})
	require.Equal(t, int64(2*mib), l.StateOffset)
	for _, o := range []machine.Options{
		{Disk: -512}, {Disk: 511}, {MaxDisk: -1}, {MaxDisk: 1 << 62}, {Disk: 1<<63 - 512}, {State: 4096}, {State: 1<<20 + 512},
		{State: -4096}, {State: 1<<62 + 4096}, {Disk: mib, ImageSize: mib}, {Disk: 512, State: 1 << 20, ImageSize: 3 * mib}, {ImageSize: 1}, {ImageSize: -1},
	} {
		_, err := machine.Plan(&o)
		require.ErrorIs(t, err, machine.ErrInvalid, "%+v", o)
	}
}

// The parts are where the layout says, and nowhere else.
func TestWindows(t *testing.T) {
	l := plan(t, machine.Options{Disk: mib, State: mib})
	dev := imagetest.NewMemory(l.ImageSize)
	d, err := machine.Format(dev, l)
	require.NoError(t, err)
	guest, err := d.Guest()
	require.NoError(t, err)
	state, err := d.State()
	require.NoError(t, err)
	fill := func(w image.Device, b byte) {
		_, err := w.WriteAt(bytes.Repeat([]byte{b}, int(w.Size())), 0)
		require.NoError(t, err)
	}
	fill(guest, 0x11)
	fill(state, 0x22)
	for _, w := range []image.Device{guest, state} {
		_, err := w.WriteAt([]byte{1}, w.Size())
		require.ErrorIs(t, err, image.ErrOutOfRange)
		of, ok := machine.Of(w)
		require.True(t, ok)
		require.Same(t, d, of)
	}
	_, ok := machine.Of(dev)
	require.False(t, ok)
	p := make([]byte, l.ImageSize)
	require.NoError(t, image.ReadFull(dev, p, 0))
	require.Equal(t, l.DiskSize, int64(bytes.Count(p[:l.DiskSize], []byte{0x11})))
	require.Zero(t, bytes.Count(p[l.DiskSize:l.StateOffset], []byte{0x22}))
	require.Equal(t, l.StateSize, int64(bytes.Count(p[l.StateOffset:][:l.StateSize], []byte{0x22})))
	again, err := machine.Open(dev)
	require.NoError(t, err)
	require.NoError(t, again.Status())
	require.Equal(t, d.Layout(), again.Layout())
	_, err = machine.Format(dev, l)
	require.ErrorIs(t, err, image.ErrExist)
}

// Windows of a machine's disk are devices like all others.
func TestConformance(t *testing.T) {
	imagetest.Conformance(t, func(t *testing.T, size int64) image.Device {
		l := plan(t, machine.Options{Disk: size, State: 256 << 10})
		d, err := machine.Format(imagetest.NewMemory(l.ImageSize), l)
		require.NoError(t, err)
		w, err := d.Guest()
		require.NoError(t, err)
		return w
	}, &imagetest.ConformanceOptions{Granule: 512})
}

func TestNoLayout(t *testing.T) {
	for _, size := range []int64{0, 1, reserved - 1, reserved, mib} {
		_, err := machine.Open(imagetest.NewMemory(size))
		require.ErrorIs(t, err, machine.ErrNoLayout, "%d", size)
		require.ErrorIs(t, err, image.ErrFormat)
	}
	// One that can't be read is no missing one.
	l := plan(t, machine.Options{Disk: mib, State: mib})
	dev := imagetest.NewMemory(l.ImageSize)
	_, err := machine.Format(dev, l)
	require.NoError(t, err)
	_, err = machine.Open(imagetest.NewFault(dev, imagetest.Fault{Mode: imagetest.Fail, Ops: imagetest.OpRead}))
	require.ErrorIs(t, err, imagetest.ErrInjected)
	// In an image of another size there is none, or a wrong one.
	r, _ := image.As[image.Resizer](dev)
	require.NoError(t, r.Resize(l.ImageSize+64<<10))
	_, err = machine.Open(dev)
	e := (*machine.Error)(nil)
	require.True(t, errors.As(err, &e) && e.Rule == "L5", "%v", err)
	require.NoError(t, r.Resize(l.ImageSize+mib))
	_, err = machine.Open(dev)
	require.ErrorIs(t, err, machine.ErrNoLayout)
}

func TestResize(t *testing.T) {
	l := plan(t, machine.Options{Disk: mib, MaxDisk: 4 * mib, State: mib})
	dev := imagetest.NewMemory(l.ImageSize)
	d, err := machine.Format(dev, l)
	require.NoError(t, err)
	for _, bad := range []int64{-512, mib + 1, 4*mib + 512} {
		require.ErrorIs(t, d.Resize(bad, true), machine.ErrInvalid)
	}
	require.ErrorIs(t, d.Resize(mib-512, false), machine.ErrShrink)
	ones := bytes.Repeat([]byte{0xff}, 4*mib)
	_, err = dev.WriteAt(ones, 0)
	require.NoError(t, err)
	require.NoError(t, d.Resize(3*mib, false))
	g, err := d.Guest()
	require.NoError(t, err)
	require.Equal(t, int64(3*mib), g.Size())
	p := make([]byte, 4*mib)
	require.NoError(t, image.ReadFull(dev, p, 0))
	require.Equal(t, ones[:mib], p[:mib], "the disk's bytes stay")
	require.Zero(t, bytes.Count(p[mib:3*mib], []byte{0xff}), "new ones are zeros")
	// What was cut off doesn't come back.
	_, err = dev.WriteAt(ones, 0)
	require.NoError(t, err)
	require.NoError(t, d.Resize(mib+512, true))
	require.NoError(t, d.Resize(4*mib, false))
	require.NoError(t, image.ReadFull(dev, p, 0))
	require.Equal(t, ones[:mib+512], p[:mib+512])
	require.Zero(t, bytes.Count(p[mib+512:], []byte{0xff}))
	again, err := machine.Open(dev)
	require.NoError(t, err)
	require.Equal(t, d.Layout(), again.Layout())
	// A damaged copy is made good, and then the other one may go.
	for slot := range int64(2) {
		_, err = dev.WriteAt(make([]byte, 512), l.ImageSize-reserved+slot*64<<10)
		require.NoError(t, err)
		d, err = machine.Open(dev)
		require.NoError(t, err)
		require.Error(t, d.Status())
		require.NoError(t, d.Resize(2*mib, true))
		require.NoError(t, d.Status())
	}
}

// A power cut at any moment leaves the old layout or the new one, the guest's
// bytes, and zeros behind them.
func TestCrash(t *testing.T) {
	l := plan(t, machine.Options{Disk: 512 * 3, MaxDisk: 2 * mib, State: 256 << 10})
	dev := imagetest.NewCrash(l.ImageSize, nil)
	d, err := machine.Format(dev, l)
	require.NoError(t, err)
	for at := range dev.Len() + 1 {
		for s := range dev.CrashStates(at, nil) {
			if d, err := machine.Open(s.Open()); err == nil {
				require.Equal(t, l.DiskSize, d.Layout().DiskSize)
			} else if !errors.Is(err, machine.ErrNoLayout) {
				require.ErrorIs(t, err, image.ErrCorrupt, "a torn record, and no other")
			}
		}
	}
	dev.Settle()
	ones := bytes.Repeat([]byte{0xff}, 8192)
	_, err = dev.WriteAt(ones, 0)
	require.NoError(t, err)
	require.NoError(t, dev.Sync())
	dev.Settle()
	sizes := []int64{512 * 3, 512 * 9, 512 * 2, 512 * 5}
	done := []int{0}
	for _, size := range sizes[1:] {
		require.NoError(t, d.Resize(size, true))
		done = append(done, dev.Len())
	}
	states := 0
	for at := range dev.Len() + 1 {
		step := 0
		for step+1 < len(done) && done[step+1] <= at {
			step++
		}
		for s := range dev.CrashStates(at, nil) {
			states++
			now, err := machine.Open(s.Open())
			require.NoError(t, err)
			size := now.Layout().DiskSize
			legal := []int64{sizes[step]}
			if step+1 < len(sizes) {
				legal = append(legal, sizes[step+1])
			}
			require.Contains(t, legal, size)
			p := make([]byte, size)
			require.NoError(t, image.ReadFull(s.Open(), p, 0))
			least := min(size, 512*3)
			if step >= 1 {
				least = min(size, 512*2)
			}
			require.Equal(t, ones[:least], p[:least])
			if size > sizes[step] {
				require.Zero(t, bytes.Count(p[sizes[step]:], []byte{0xff}), "no old bytes come back")
			}
		}
	}
	require.Greater(t, states, 20)
}

func TestNodes(t *testing.T) {
	l := plan(t, machine.Options{Disk: mib, State: mib})
	nodes := l.Nodes(&machine.File{Path: "a,b", Format: "qcow2", KeySecret: "k"})
	var got []string
	for i := range nodes {
		got = append(got, nodes[i].String())
	}
	require.Equal(t, []string{
		"driver=file,node-name=nvstore-file,filename=a,,b,discard=unmap",
		"driver=qcow2,node-name=nvstore-disk,file=nvstore-file,encrypt.format=luks,encrypt.key-secret=k,discard=unmap",
		"driver=raw,node-name=guest,file=nvstore-disk,offset=0,size=1048576,discard=unmap",
		"driver=raw,node-name=nv,file=nvstore-disk,offset=2097152,size=1048576,discard=unmap",
	}, got)
}
