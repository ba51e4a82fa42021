package bench

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/internal/qtest"
	"nvstore.dev/machine/live"
	"nvstore.dev/nvstore"
)

// What a Put of 6 KiB writes: two blocks of content, a node of the directory,
// one of free space, a root.
const (
	livePut   = 6 << 10
	liveWrite = 4*4096 + 512
	liveSize  = 64 << 20
)

// liveTables: a durable Put through a QEMU that runs, beside qemu-img's write
// and flush of the same bytes through the same export, and beside a Put on the
// file.
func liveTables(t *testing.T) {
	dir, err := filepath.Abs(directory(t))
	require.NoError(t, err)
	socks, err := os.MkdirTemp("", "bench")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(socks) })
	disk, qmp := filepath.Join(dir, "live.qcow2"), filepath.Join(socks, "q")
	same, err := nvstore.Create(filepath.Join(dir, "file.qcow2"), &nvstore.CreateOptions{Size: liveSize})
	require.NoError(t, err)
	defer func() { require.NoError(t, same.Close()) }()
	s, err := nvstore.Create(disk, &nvstore.CreateOptions{Size: liveSize})
	require.NoError(t, err)
	require.NoError(t, s.Close())
	m, err := qtest.Start("qemu-system-x86_64", "-nodefaults", "-accel", "tcg", "-m", "16", "-qmp", "unix:"+qmp+",server=on,wait=off",
		"-blockdev", "driver=qcow2,node-name=nv,file.driver=file,file.filename="+disk)
	require.NoError(t, err)
	defer m.Close()
	a, err := live.Attach(context.Background(), qmp, &live.Options{Export: live.Export{Connections: 2}})
	require.NoError(t, err)
	defer func() { require.NoError(t, a.Close()) }()
	count := scale(400, 5)
	n := 0
	puts := func(s *nvstore.Store) float64 {
		begun := time.Now()
		for range count {
			p := make([]byte, livePut)
			n++
			copy(p, strconv.Itoa(n))
			require.NoError(t, s.Put(fmt.Sprintf("blob/%d", n%8), p, nil))
		}
		return float64(count) / time.Since(begun).Seconds()
	}
	// In the half of the image that the store doesn't reach.
	qemuImg := func() float64 {
		out, err := exec.Command("qemu-img", "bench", "-f", "raw", "-w", "-s", strconv.Itoa(liveWrite), "-o", strconv.Itoa(liveSize/2), "-c", strconv.Itoa(count),
			"-d", "1", "--flush-interval=1", a.URI()).CombinedOutput()
		require.NoError(t, err, "%s", out)
		match := completed.FindSubmatch(out)
		require.NotNil(t, match, "%s", out)
		seconds, err := strconv.ParseFloat(string(match[1]), 64)
		require.NoError(t, err)
		return float64(count) / max(seconds, 1e-6)
	}
	names := []string{"qemu-img bench", "Put on the file", "Put through QEMU"}
	out, add := rateTable("A running machine: durable writes of 16.5 KiB a second (goal: Put through QEMU at least 0.67 of qemu-img bench)", names)
	add("Put of 6 KiB, write and flush", rates(names, scale(5, 1), func(name string) float64 {
		switch name {
		case "qemu-img bench":
			return qemuImg()
		case "Put on the file":
			return puts(same)
		}
		return puts(a.Store())
	}))
	out.print(os.Stdout)
}
