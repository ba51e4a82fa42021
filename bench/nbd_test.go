package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image/nbd"
)

const nbdSize = 64 << 20 // of the disk that is served

// background runs a program until the test ends.
func background(t *testing.T, ready func() bool, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		_ = cmd.Wait()
	})
	for begun := time.Now(); !ready(); time.Sleep(5 * time.Millisecond) {
		require.Less(t, time.Since(begun), 30*time.Second, "%s isn't ready", name)
	}
}

// nbdServers starts the subjects, each with a disk of its own with the same
// bytes, and returns their names in order and their URIs.
func nbdServers(t *testing.T, dir string) (names []string, uris map[string]string) {
	t.Helper()
	nvtool := built(t, dir, "nvtool")
	socks, err := os.MkdirTemp("", "nbd")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(socks) })
	content := make([]byte, nbdSize)
	rng := rand.NewChaCha8([32]byte{1})
	_, _ = rng.Read(content)
	uris = map[string]string{}
	for _, s := range []struct {
		name string
		args func(file, sock string) []string
	}{
		{"qemu-nbd", func(file, sock string) []string {
			return []string{"qemu-nbd", "-t", "-f", "raw", "-e", "16", "-k", sock, file}
		}},
		{"nbdkit", func(file, sock string) []string { return []string{"nbdkit", "-f", "-U", sock, "file", file} }},
		{"nvtool", func(file, sock string) []string {
			return []string{nvtool, "serve", "nbd", file, "-f", "raw", "--device", "--socket", sock}
		}},
	} {
		file := filepath.Join(dir, s.name+".raw")
		require.NoError(t, os.WriteFile(file, content, 0o600))
		sock := filepath.Join(socks, s.name)
		args := s.args(file, sock)
		background(t, func() bool {
			c, err := net.Dial("unix", sock)
			if err == nil {
				c.Close()
			}
			return err == nil
		}, args[0], args[1:]...)
		names = append(names, s.name)
		uris[s.name] = "nbd+unix:///?socket=" + sock
	}
	return names, uris
}

// fio returns the operations a second of random requests of 4 KiB.
func fio(t *testing.T, rw string, depth int, args ...string) float64 {
	t.Helper()
	args = append(args, "--name=x", "--rw="+rw, "--bs=4k", fmt.Sprintf("--iodepth=%d", depth), "--output-format=json", "--randrepeat=0")
	if *tables {
		args = append(args, "--time_based", "--runtime=2")
	} else {
		args = append(args, "--number_ios=50")
	}
	out, err := exec.Command("fio", args...).CombinedOutput()
	require.NoError(t, err, "%s", out)
	var result struct {
		Jobs []struct{ Read, Write struct{ IOPS float64 } }
	}
	begin := bytes.Index(out, []byte("{\n")) // after what the engine says
	require.GreaterOrEqual(t, begin, 0, "%s", out)
	require.NoError(t, json.NewDecoder(bytes.NewReader(out[begin:])).Decode(&result), "%s", out)
	return result.Jobs[0].Read.IOPS + result.Jobs[0].Write.IOPS
}

var completed = regexp.MustCompile(`Run completed in ([0-9.]+) seconds`)

// qemuBench returns the operations a second of QEMU's own client, with requests
// of 4 KiB one behind the other.
func qemuBench(t *testing.T, uri string, depth int, args ...string) float64 {
	t.Helper()
	count := scale(20_000, 100)
	args = append([]string{"bench", "-f", "raw", "-s", "4096", "-c", strconv.Itoa(count), "-d", strconv.Itoa(depth)}, append(args, uri)...)
	out, err := exec.Command("qemu-img", args...).CombinedOutput()
	require.NoError(t, err, "%s", out)
	m := completed.FindSubmatch(out)
	require.NotNil(t, m, "%s", out)
	seconds, err := strconv.ParseFloat(string(m[1]), 64)
	require.NoError(t, err)
	return float64(count) / max(seconds, 1e-6)
}

// rates measures ways in turns and returns the median rate of each.
func rates(names []string, rounds int, measure func(name string) float64) map[string]float64 {
	all := map[string][]float64{}
	order := rand.New(rand.NewPCG(1, 2))
	for range rounds {
		for _, i := range order.Perm(len(names)) {
			all[names[i]] = append(all[names[i]], measure(names[i]))
		}
	}
	out := map[string]float64{}
	for name, list := range all {
		slices.Sort(list)
		out[name] = list[len(list)/2]
	}
	return out
}

// rateTable prints operations a second, and as a ratio to the first name's.
func rateTable(title string, names []string) (t *table, add func(what string, r map[string]float64)) {
	t = &table{title: title, columns: append([]string{"operations a second"}, names...)}
	for _, name := range names[1:] {
		t.columns = append(t.columns, name+", ratio")
	}
	return t, func(what string, r map[string]float64) {
		cells := []any{what}
		for _, name := range names {
			cells = append(cells, int(r[name]))
		}
		for _, name := range names[1:] {
			cells = append(cells, r[name]/r[names[0]])
		}
		t.add(cells...)
	}
}

// nbdTables: our server beside others, our client beside others, and blobs as
// files beside a plain file.
func nbdTables(t *testing.T) {
	dir, err := filepath.Abs(directory(t))
	require.NoError(t, err)
	names, uris := nbdServers(t, dir)
	rounds := scale(3, 1)
	out, add := rateTable("NBD servers, 4 KiB (goal: nvtool at least 1.00 in random reads and writes)", names)
	for _, depth := range scale([]int{1, 16}, []int{16}) {
		for _, c := range []struct {
			what, rw string
			args     []string
		}{{"random read", "randread", nil}, {"random write", "randwrite", nil}, {"random write and flush", "randwrite", []string{"--fsync=1"}}} {
			add(fmt.Sprintf("fio: %s, %d in flight", c.what, depth), rates(names, rounds, func(name string) float64 {
				return fio(t, c.rw, depth, append(c.args, "--ioengine=nbd", "--uri="+uris[name])...)
			}))
		}
		for _, c := range []struct {
			what string
			args []string
		}{{"read", nil}, {"write", []string{"-w"}}, {"write with FUA", []string{"-w", "-t", "writethrough"}}} {
			add(fmt.Sprintf("qemu-img bench: %s, %d in flight", c.what, depth), rates(names, rounds, func(name string) float64 {
				return qemuBench(t, uris[name], depth, c.args...)
			}))
		}
	}
	out.print(os.Stdout)

	clients := []string{"qemu-img bench", "fio (libnbd)", "nvstore"}
	out, add = rateTable("NBD clients on nbdkit, reads of 4 KiB", clients)
	for _, depth := range scale([]int{1, 16}, []int{16}) {
		add(fmt.Sprintf("%d in flight", depth), rates(clients, rounds, func(name string) float64 {
			switch name {
			case clients[0]:
				return qemuBench(t, uris["nbdkit"], depth)
			case clients[1]:
				return fio(t, "read", depth, "--ioengine=nbd", "--uri="+uris["nbdkit"])
			}
			return ourReads(t, uris["nbdkit"], depth)
		}))
	}
	out.print(os.Stdout)
	fuseTable(t, dir, rounds)
}

// ourReads returns the operations a second of our client.
func ourReads(t *testing.T, uri string, depth int) float64 {
	t.Helper()
	d, err := nbd.Open(context.Background(), uri, nil)
	require.NoError(t, err)
	defer d.Close()
	count := scale(20_000, 100)
	begun := time.Now()
	var wg sync.WaitGroup
	errs := make(chan error, depth)
	for w := range depth {
		wg.Go(func() {
			p := make([]byte, 4096)
			for i := w; i < count; i += depth {
				if _, err := d.ReadAt(p, int64(i)*4096%nbdSize); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	require.NoError(t, <-errs)
	return float64(count) / time.Since(begun).Seconds()
}

// fuseTable compares a blob that is shown as a file with a plain file.
func fuseTable(t *testing.T, dir string, rounds int) {
	nvtool, image, mnt := filepath.Join(dir, "nvtool"), filepath.Join(dir, "fuse.raw"), filepath.Join(dir, "mnt")
	out, err := exec.Command(nvtool, "create", image, "-f", "raw", "--size", "128M", "-q").CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.NoError(t, os.Mkdir(mnt, 0o700))
	t.Run("FUSE", func(t *testing.T) {
		pid := filepath.Join(dir, "pid")
		background(t, func() bool { _, err := os.Stat(pid); return err == nil }, nvtool, "serve", "fuse", image, mnt, "--pid-file", pid)
		content := make([]byte, 8<<20)
		_, _ = rand.NewChaCha8([32]byte{2}).Read(content)
		files := map[string]string{"plain file": filepath.Join(dir, "plain"), "nvtool serve fuse": filepath.Join(mnt, "blob")}
		for _, path := range files {
			require.NoError(t, os.WriteFile(path, content, 0o600))
		}
		names := []string{"plain file", "nvtool serve fuse"}
		out, add := rateTable("A blob as a file, beside a plain file, 4 KiB", names)
		for _, c := range []struct {
			what, rw string
			args     []string
		}{
			{"random read, cached", "randread", nil},
			{"random write", "randwrite", nil},
			{"random write and fsync", "randwrite", []string{"--fsync=1"}},
		} {
			add(c.what, rates(names, rounds, func(name string) float64 {
				return fio(t, c.rw, 1, append(c.args, "--ioengine=psync", "--filename="+files[name], "--size=8m")...)
			}))
		}
		out.print(os.Stdout)
	})
}
