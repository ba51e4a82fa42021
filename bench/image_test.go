package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
)

// imageMiB is the size of the disk that is converted, $NVSTORE_BENCH_MIB or
// 1 GiB.
func imageMiB(t *testing.T) int64 {
	if v := os.Getenv("NVSTORE_BENCH_MIB"); v != "" {
		n, err := strconv.ParseInt(v, 10, 64)
		require.NoError(t, err)
		return n
	}
	return scale[int64](1024, 8)
}

// A process is a runner of commands that each do one operation.
type process struct {
	args   []string
	output string // removed before each run
	peak   *int64 // most KiB in RAM of any run
	size   *int64 // of the output, in bytes
}

func (p *process) run(int) (sample, error) {
	if p.output != "" {
		if err := os.Remove(p.output); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return sample{}, err
		}
	}
	cmd := exec.Command(os.Args[0], p.args...)
	cmd.Env = append(os.Environ(), childEnv+"="+jobRun)
	var printed, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &printed, &said
	if err := cmd.Run(); err != nil {
		return sample{}, fmt.Errorf("%s: %w: %s", strings.Join(p.args, " "), err, said.Bytes())
	}
	var s sample
	var peak int64
	if _, err := fmt.Sscan(printed.String(), (*int64)(&s.wall), (*int64)(&s.cpu), &peak); err != nil {
		return sample{}, err
	}
	*p.peak = max(*p.peak, peak)
	if p.output != "" {
		info, err := os.Stat(p.output)
		if err != nil {
			return sample{}, err
		}
		*p.size = allocated(info)
	}
	return s, nil
}

// runCommand is a child's job: it runs a command, and prints the nanoseconds
// that took by the clock and of CPU, and the most KiB that it had in RAM. What
// a process had at its exec counts (getrusage(2)), and that is what its parent
// has: this small child, not a program that holds the benchmark's data.
func runCommand(args []string) error {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	start := time.Now()
	if err := cmd.Run(); err != nil {
		return err
	}
	wall := time.Since(start)
	ru, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	if !ok {
		return errors.New("no resource usage")
	}
	fmt.Println(int64(wall), int64(cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime()), ru.Maxrss)
	return nil
}

func (p *process) close() error {
	if p.output != "" {
		return os.Remove(p.output)
	}
	return nil
}

func allocated(info fs.FileInfo) int64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512
	}
	return info.Size()
}

// A job is done by qemu-img and by nvtool with the same arguments.
type job struct {
	name   string
	args   string // of qemu-img; SRC and OUT are paths
	own    string // of nvtool img, if they differ
	output bool
	runs   int
	goal   float64 // qemu-img's time over ours; 0 is none
}

// imageTables compares nvtool img with qemu-img.
func imageTables(t *testing.T) {
	dir := directory(t)
	own := built(t, dir, "nvtool")
	mib := imageMiB(t)
	raw := filepath.Join(dir, "disk.raw")
	realFiles(t, raw, mib<<20)
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, c := range [][]string{
		{"-O", "qcow2", raw, at("plain")},
		{"-O", "qcow2", "-c", raw, at("zlib")},
		{"-O", "qcow2", "-c", "-o", "compression_type=zstd", raw, at("zstd")},
	} {
		out, err := exec.Command("qemu-img", append([]string{"convert", "-f", "raw", "-m", "16", "-W"}, c...)...).CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	long, short := scale(5, 1), scale(9, 1)
	table := &table{title: fmt.Sprintf("Images of %d MiB of /usr/lib and /usr/bin; qemu-img, then nvtool, best of all runs; a ratio above 1 means that nvtool is faster", mib),
		columns: []string{"job", "wall s", "wall s", "ratio", "goal", "CPU s", "CPU s", "ratio", "MiB RAM", "MiB RAM", "MiB file", "MiB file"}}
	for _, j := range []job{
		{"raw to qcow2, durable", "convert -t writeback -f raw -O qcow2 " + raw + " OUT", "", true, short, 1},
		{"raw to qcow2, not durable", "convert -t unsafe -f raw -O qcow2 " + raw + " OUT", "", true, short, 1},
		{"qcow2 to raw, durable", "convert -t writeback -f qcow2 -O raw " + at("plain") + " OUT", "", true, short, 1},
		{"qcow2 to raw, not durable", "convert -t unsafe -f qcow2 -O raw " + at("plain") + " OUT", "", true, short, 1},
		{"write deflate", "convert -t unsafe -c -f raw -O qcow2 " + raw + " OUT", "", true, long, 1.5},
		{"read deflate", "convert -t unsafe -f qcow2 -O raw " + at("zlib") + " OUT", "", true, short, 1.5},
		{"write zstd", "convert -t unsafe -c -o compression_type=zstd -f raw -O qcow2 " + raw + " OUT", "", true, long, 1.5},
		{"read zstd", "convert -t unsafe -f qcow2 -O raw " + at("zstd") + " OUT", "", true, short, 1.5},
		{"compare raw, qcow2", "compare -f raw -F qcow2 " + raw + " " + at("plain"), "", false, short, 0},
		{"compare deflate, zstd", "compare -f qcow2 -F qcow2 " + at("zlib") + " " + at("zstd"), "", false, short, 0},
		{"check", "check -f qcow2 " + at("zlib"), "", false, short, 0},
		{"map", "map --output=json -f qcow2 " + at("zlib"), "", false, short, 0},
	} {
		j.add(t, dir, own, table)
	}
	show(table)
	openTable(t, dir, own)
	randomTable(t, dir, at("plain"), mib<<20)
}

func (j *job) add(t *testing.T, dir, own string, tb *table) {
	var peaks, sizes [2]int64
	subjects := make([]subject, 2)
	for i, program := range [][]string{{"qemu-img"}, {own, "img"}} {
		subjects[i] = subject{j.name, func(sub string) (runner, error) {
			p := &process{peak: &peaks[i], size: &sizes[i]}
			if j.output {
				p.output = filepath.Join(sub, "out")
			}
			args := j.args
			if i == 1 && j.own != "" {
				args = j.own
			}
			for _, a := range strings.Fields(args) {
				if a == "OUT" {
					a = p.output
				}
				p.args = append(p.args, a)
			}
			p.args = append(slices.Clone(program), p.args...)
			return p, nil
		}}
	}
	rows := measureTurns(t, dir, subjects, j.runs, 1)
	goal := "-"
	if j.goal > 0 {
		goal = fmt.Sprintf("%.1f", j.goal)
	}
	seconds := func(d time.Duration) string { return fmt.Sprintf("%.3f", d.Seconds()) }
	a, b := rows[0], rows[1]
	// The best run is the one that others on the machine disturbed least.
	best := func(r *row) time.Duration { return r.quantile(0) }
	tb.add(j.name, seconds(best(a)), seconds(best(b)), ratio(best(a), best(b)), goal,
		seconds(a.meanCPU()), seconds(b.meanCPU()), ratio(a.meanCPU(), b.meanCPU()),
		mib(peaks[0]<<10), mib(peaks[1]<<10), mib(sizes[0]), mib(sizes[1]))
}

// realFiles fills a file with what the machine has.
func realFiles(t *testing.T, path string, size int64) {
	f, err := os.Create(path)
	require.NoError(t, err)
	left := size
	for _, top := range []string{"/usr/lib", "/usr/bin", "/usr/share"} {
		require.NoError(t, filepath.WalkDir(top, func(name string, d fs.DirEntry, err error) error {
			if err != nil || left <= 0 || !d.Type().IsRegular() {
				return nil
			}
			src, err := os.Open(name)
			if err != nil {
				return nil // not ours to read
			}
			defer src.Close()
			n, err := io.CopyN(f, src, left)
			left -= n
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return err
		}))
	}
	require.NoError(t, f.Truncate(size))
	require.NoError(t, f.Close())
}

// openTable opens an image of 1 TiB that has many L2 tables.
func openTable(t *testing.T, dir, own string) {
	path := filepath.Join(dir, "large")
	p, err := chain.Create(path, &chain.CreateOptions{Format: onQCOW2, Size: 1 << 40})
	require.NoError(t, err)
	for off := int64(0); off < 1<<40; off += scale[int64](1<<30, 64<<30) {
		_, err := p.Device.WriteAt([]byte("block"), off)
		require.NoError(t, err)
	}
	require.NoError(t, p.Device.Sync())
	require.NoError(t, p.Commit())
	require.NoError(t, p.Device.Close())
	var peak [2]int64
	run := func(i int, args ...string) subject {
		return subject{strings.Join(append([]string{filepath.Base(args[0])}, args[1:len(args)-1]...), " "),
			func(string) (runner, error) { return &process{args: args, peak: &peak[i]}, nil }}
	}
	open := func(name string, readOnly bool) subject {
		return subject{name, func(string) (runner, error) {
			return &openRunner{open: func() (func() error, error) {
				d, err := chain.Open(path, &chain.Options{Format: onQCOW2, ReadOnly: readOnly})
				if err != nil {
					return nil, err
				}
				_, err = d.ReadAt(make([]byte, 4096), 1<<39)
				return d.Close, err
			}}, nil
		}}
	}
	rows := measure(t, dir, []subject{run(0, "qemu-img", "info", "-f", "qcow2", path), run(1, own, "img", "info", "-f", "qcow2", path),
		open("open for reading, and read 4 KiB", true), open("open for writing, and read 4 KiB", false)}, scale(100, 5))
	show(timeTable("Opening a qcow2 of 1 TiB (goal: 1000 µs)", rows))
}

// randomTable does random requests on a qcow2 image: through qemu-nbd with fio
// as its client, and on the Device.
func randomTable(t *testing.T, dir, path string, size int64) {
	out := &table{title: "Random requests of 4 KiB on a qcow2, a second; goal for reads: 5 times qemu-nbd's",
		columns: []string{"requests", "in flight", "qemu-nbd", "Device", "ratio"}}
	for _, op := range []string{"read", "write"} {
		for _, depth := range scale([]int{1, 16}, []int{16}) {
			var peer, own []float64
			for range scale(3, 1) {
				peer = append(peer, fioNBD(t, dir, path, op, depth))
				own = append(own, deviceRate(t, path, size, op, depth))
			}
			slices.Sort(peer)
			slices.Sort(own)
			p, o := peer[len(peer)/2], own[len(own)/2]
			out.add(op, depth, fmt.Sprintf("%.0f", p), fmt.Sprintf("%.0f", o), o/p)
		}
	}
	show(out)
}

// span is how long one measurement takes.
func span() time.Duration { return scale(3*time.Second, 200*time.Millisecond) }

func deviceRate(t *testing.T, path string, size int64, op string, depth int) float64 {
	d, err := chain.Open(path, &chain.Options{Format: onQCOW2, ReadOnly: op == "read"})
	require.NoError(t, err)
	defer func() { require.NoError(t, d.Close()) }()
	var done atomic.Int64
	ctx, cancel := context.WithTimeout(t.Context(), span())
	defer cancel()
	var wg sync.WaitGroup
	errs := make([]error, depth)
	start := time.Now()
	for w := range depth {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 9))
			buf := make([]byte, 4096)
			for ctx.Err() == nil {
				off := rng.Int64N(size/4096) * 4096
				var err error
				if op == "read" {
					err = image.ReadFull(d, buf, off)
				} else {
					_, err = d.WriteAt(buf, off)
				}
				if err != nil {
					errs[w] = err
					return
				}
				done.Add(1)
			}
		})
	}
	wg.Wait()
	require.NoError(t, errors.Join(errs...))
	return float64(done.Load()) / time.Since(start).Seconds()
}

// fioNBD serves the image with qemu-nbd and returns what fio's client gets.
func fioNBD(t *testing.T, dir, path, op string, depth int) float64 {
	sock := filepath.Join(os.TempDir(), fmt.Sprintf("nvstore-bench-%d.sock", os.Getpid()))
	defer os.Remove(sock)
	server := exec.Command("qemu-nbd", "-t", "-f", "qcow2", "--cache=writeback", "--aio=threads", "-e", "4", "-k", sock, path)
	server.Stderr = os.Stderr
	require.NoError(t, server.Start())
	defer func() {
		require.NoError(t, server.Process.Signal(unix.SIGTERM))
		server.Wait()
	}()
	for range 500 {
		if _, err := os.Stat(sock); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	cmd := exec.Command("fio", "--name=x", "--ioengine=nbd", "--uri=nbd+unix:///?socket="+sock, "--rw=rand"+op, "--bs=4k",
		fmt.Sprintf("--iodepth=%d", depth), "--time_based", fmt.Sprintf("--runtime=%dms", span().Milliseconds()), "--output-format=json")
	cmd.Dir = dir
	text, err := cmd.Output()
	require.NoError(t, err, "%s", text)
	var v struct {
		Jobs []map[string]json.RawMessage `json:"jobs"`
	}
	text = text[max(0, bytes.IndexByte(text, '{')):]
	require.NoError(t, json.Unmarshal(text, &v))
	var part struct {
		IOPS float64 `json:"iops"`
	}
	require.NoError(t, json.Unmarshal(v.Jobs[0][op], &part))
	return part.IOPS
}
