package qcow2_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/qcow2"
)

// clusterText makes n bytes of which some clusters get smaller, by much or by
// little, and some don't.
func clusterText(rng *rand.Rand, n, cs int) []byte {
	p := make([]byte, n)
	for off := 0; off < n; off += cs {
		b := p[off:min(n, off+cs)]
		step := [...]int{1, 2, 16, 100}[rng.IntN(4)]
		for i := 0; i < len(b); i += step {
			b[i] = byte(rng.Uint32())
		}
		if rng.IntN(4) == 0 {
			copy(b[len(b)/2:], b) // far matches
		}
	}
	return p
}

// TestWriteCompressed writes from several goroutines, over what is there, and
// has QEMU read it.
func TestWriteCompressed(t *testing.T) {
	rng := rand.New(rand.NewPCG(seed(t), 1))
	for _, o := range []qcow2.CreateOptions{
		{}, {Compression: "zstd"}, {ClusterSize: 512}, {ClusterSize: 4096, Version: 2}, {ClusterSize: 2 << 20},
		{ClusterSize: 4096, RefcountBits: 1}, {ClusterSize: 4096, RefcountBits: 2, Compression: "zstd"},
		{ExtendedL2: true, ClusterSize: 16384}, {ExtendedL2: true, Compression: "zstd"},
	} {
		cs := o.ClusterSize
		if cs == 0 {
			cs = 65536
		}
		t.Run(fmt.Sprintf("%d-%s-r%d-%t", cs, o.Compression, o.RefcountBits, o.ExtendedL2), func(t *testing.T) {
			n := min(max(40*cs, 200<<10), 9<<20)
			o.Size = int64(n + 512)
			want := clusterText(rng, n+512, cs)
			im, d := create(t, &o)
			for round := range 3 {
				var wg sync.WaitGroup
				fail := make(chan error, 8)
				for w := range 4 {
					wg.Go(func() {
						for off := w * cs; off < len(want); off += 4 * cs {
							p := want[off:min(len(want), off+cs)]
							if k, err := im.WriteCompressed(p, int64(off)); err != nil || k != len(p) {
								fail <- fmt.Errorf("%d bytes of %d: %w", k, len(p), err)
								return
							}
						}
					})
				}
				wg.Wait()
				close(fail)
				for err := range fail {
					require.NoError(t, err)
				}
				require.True(t, bytes.Equal(want, contents(t, im)))
				if round == 0 {
					require.NoError(t, im.Sync())
					// A normal write over compressed clusters.
					copy(want[cs/2:], bytes.Repeat([]byte{7}, 2*cs))
					_, err := im.WriteAt(want[cs/2:][:2*cs], int64(cs/2))
					require.NoError(t, err)
				} else {
					copy(want[len(want)/2:], clusterText(rng, len(want)/3, cs))
				}
			}
			for off := 0; off < len(want); off += cs {
				p := want[off:min(len(want), off+cs)]
				_, err := im.WriteCompressed(p, int64(off))
				require.NoError(t, err)
			}
			r, err := im.Check(t.Context(), &qcow2.CheckOptions{Data: true})
			require.NoError(t, err)
			require.Zero(t, r.Errors+r.Leaks, "%+v", r.Findings)
			require.Positive(t, r.Compressed)
			require.NoError(t, im.Close())
			checkDevice(t, d, want)

			// And QEMU goes on.
			path := filepath.Join(tempDir(t), "img")
			dump(t, d, path)
			qemuIO(t, path, fmt.Sprintf("write -P 9 %d %d", cs, cs), "write -P 8 0 512")
			copy(want[cs:], bytes.Repeat([]byte{9}, cs))
			copy(want, bytes.Repeat([]byte{8}, 512))
			im = open(t, load(t, path))
			require.True(t, bytes.Equal(want, contents(t, im)))
			noErrors(t, im, false)
			require.NoError(t, im.Close())
			os.Remove(path)
		})
	}
}

// TestPacked: compressed clusters take hardly more room than their data.
func TestPacked(t *testing.T) {
	im, d := create(t, &qcow2.CreateOptions{Size: 16 << 20})
	p := make([]byte, 16<<20)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := 0; i < len(p); i += 64 {
		p[i] = byte(rng.Uint32())
	}
	_, err := im.WriteCompressed(p, 0)
	require.NoError(t, err)
	require.NoError(t, im.Close())
	path := filepath.Join(tempDir(t), "img")
	dump(t, d, path)
	tool(t, "qemu-img", "convert", "-O", "raw", "-f", "qcow2", path, path+".raw")
	tool(t, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", path+".raw", path+".qemu")
	theirs, err := os.Stat(path + ".qemu")
	require.NoError(t, err)
	t.Logf("%d bytes; qemu-img -c: %d", d.Size(), theirs.Size())
	require.Less(t, d.Size(), theirs.Size()*5/4)
	os.Remove(path + ".raw")
	os.Remove(path + ".qemu")
}

func TestWriteCompressedRefused(t *testing.T) {
	im, _ := create(t, &qcow2.CreateOptions{Size: 1<<20 + 512, ClusterSize: 4096})
	for _, c := range [][2]int{{512, 4096}, {0, 512}, {4096, 5000}} {
		_, err := im.WriteCompressed(make([]byte, c[1]), int64(c[0]))
		require.ErrorIs(t, err, image.ErrUnsupported)
	}
	_, err := im.WriteCompressed(make([]byte, 8192), 1<<20)
	require.ErrorIs(t, err, image.ErrOutOfRange)
	_, err = im.WriteCompressed(make([]byte, 512), 1<<20)
	require.NoError(t, err)
	require.NoError(t, im.Close())
	for _, v := range []variant{{data: true}, {crypt: true}} {
		_, im, _ := v.build(t, memory(t, nil), 1<<20, nil)
		_, err := im.WriteCompressed(make([]byte, 65536), 0)
		require.ErrorIs(t, err, image.ErrUnsupported)
		require.NoError(t, im.Close())
	}
}

// TestPackReuse: compressed data isn't added to a cluster that was freed and is
// another's by now.
func TestPackReuse(t *testing.T) {
	const cs = 4096
	im, _ := create(t, &qcow2.CreateOptions{Size: 1 << 20, ClusterSize: cs})
	text := bytes.Repeat([]byte("text"), cs/4)
	_, err := im.WriteCompressed(text, 0)
	require.NoError(t, err)
	require.NoError(t, im.Sync())
	require.NoError(t, im.Discard(0, cs))
	require.NoError(t, im.Sync()) // the cluster is free
	want := make([]byte, 1<<20)
	rng := rand.New(rand.NewPCG(1, 2))
	for off := cs; off < 900<<10; off += cs {
		for i := range cs {
			want[off+i] = byte(rng.Uint32())
		}
		_, err := im.WriteAt(want[off:][:cs], int64(off))
		require.NoError(t, err)
	}
	_, err = im.WriteCompressed(text, 1000<<10)
	require.NoError(t, err)
	copy(want[1000<<10:], text)
	require.True(t, bytes.Equal(want, contents(t, im)))
	noErrors(t, im, false)
	require.NoError(t, im.Close())
}
