package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
)

func seedImages(t testing.TB) [][]byte {
	var out [][]byte
	for _, o := range []qcow2.CreateOptions{
		{Size: 1 << 20, ClusterSize: 512},
		{Size: 1 << 20, ClusterSize: 512, Version: 2},
		{Size: 1 << 20, ClusterSize: 4096, Extensions: []qcow2.Extension{{Type: 1, Data: []byte("abc")}}},
		{Size: 1 << 20, ClusterSize: 512, RefcountBits: 1},
	} {
		im, d := create(t, &o)
		_, err := im.WriteAt([]byte("some data in a cluster"), 5000)
		require.NoError(t, err)
		if o.RefcountBits == 0 {
			require.NoError(t, im.Snapshots().Create("s"))
			_, err = im.WriteAt([]byte("and in another"), 9000)
			require.NoError(t, err)
		}
		require.NoError(t, im.Close())
		b := make([]byte, d.Size())
		require.NoError(t, image.ReadFull(d, b, 0))
		out = append(out, b)
	}
	return append(out, newVictim(t).b)
}

// FuzzHeader: what is parsed and encoded is the same again, the header's fixed
// part byte by byte.
func FuzzHeader(f *testing.F) {
	for _, b := range seedImages(f) {
		f.Add(b[:min(4096, len(b))])
	}
	for _, c := range atOpen {
		v := newVictim(f)
		c.fault(v)
		f.Add(v.b[:4096])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 64<<10 {
			return
		}
		once, err := qcow2.ParseAndEncode(b)
		if err != nil {
			require.Nil(t, once)
			return
		}
		n := qcow2.HeaderLen(b)
		require.Equal(t, b[:n], once[:n])
		whole := make([]byte, len(b))
		copy(whole, once)
		twice, err := qcow2.ParseAndEncode(whole)
		require.NoError(t, err)
		require.True(t, bytes.Equal(once, twice))
	})
}

// FuzzOpen: no image makes the driver panic, take long, or write where its own
// check then finds more errors than before.
func FuzzOpen(f *testing.F) {
	for _, b := range seedImages(f) {
		f.Add(b)
	}
	for _, c := range atOpen {
		v := newVictim(f)
		c.fault(v)
		f.Add(v.b)
	}
	for _, c := range later {
		v := newVictim(f)
		c.fault(v)
		f.Add(v.b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<20 {
			return
		}
		file := imagetest.NewCrash(int64(len(b)), &imagetest.CrashOptions{MaxSize: 8 << 20})
		_, err := file.WriteAt(b, 0)
		require.NoError(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		_, _ = qcow2.Inspect(file, "")
		im, err := qcow2.Open(&keep{file}, &qcow2.OpenOptions{ReadOnly: true})
		if err != nil {
			var fe *image.FormatError
			require.True(t, errors.As(err, &fe), "%v", err)
			return
		}
		before, err := im.Check(ctx, &qcow2.CheckOptions{Data: true, MaxFindings: 10})
		require.NoError(t, err)
		exercise(im)
		require.NoError(t, im.Close())

		im, err = qcow2.Open(&keep{file}, &qcow2.OpenOptions{InvalidateBitmaps: true})
		if err != nil {
			require.Nil(t, im)
			return
		}
		exercise(im)
		_ = im.Close()
		im, err = qcow2.Open(&keep{file}, &qcow2.OpenOptions{ReadOnly: true})
		require.NoError(t, err)
		after, err := im.Check(ctx, &qcow2.CheckOptions{MaxFindings: 10})
		require.NoError(t, err)
		if before.Errors == 0 {
			require.Zero(t, after.Errors, "%+v", after.Findings)
		}
	})
}

// FuzzRepair: no image makes a repair panic or take long, and what it calls whole
// is.
func FuzzRepair(f *testing.F) {
	for _, b := range seedImages(f) {
		f.Add(b)
	}
	for _, c := range later {
		v := newVictim(f)
		c.fault(v)
		f.Add(v.b)
	}
	v := newVictim(f)
	v.bitmaps(1, 32, v.l2)
	f.Add(v.b)
	for _, fault := range []func(v *victim){
		func(v *victim) { v.put32(56, 0) }, func(v *victim) { v.put(48, 1<<40) }, func(v *victim) { v.put32(60, 70_000) },
	} {
		v := newVictim(f)
		fault(v)
		f.Add(v.b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<20 {
			return
		}
		file := imagetest.NewCrash(int64(len(b)), &imagetest.CrashOptions{MaxSize: 16 << 20})
		_, err := file.WriteAt(b, 0)
		require.NoError(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		r, err := qcow2.Repair(ctx, &keep{file}, &qcow2.RepairOptions{Check: qcow2.CheckOptions{MaxFindings: 10}})
		if err != nil {
			require.Nil(t, r)
			require.NoError(t, ctx.Err())
			return
		}
		if r.Errors > 0 {
			return
		}
		im, err := qcow2.Open(&keep{file}, &qcow2.OpenOptions{NoBacking: true, InvalidateBitmaps: true})
		if errors.Is(err, image.ErrUnsupported) {
			return // encrypted, or with a data file
		}
		require.NoError(t, err)
		noErrors(t, im, false)
		exercise(im)
		_ = im.Close()
	})
}
