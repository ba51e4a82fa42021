package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.etcd.io/bbolt"

	"nvstore.dev/image/chain"
	"nvstore.dev/nvstore"
)

// childEnv makes the test's program a child that does one job and prints what
// memory it took: "JOB LOCATION".
const childEnv = "NVSTORE_BENCH_CHILD"

// jobs are a child's jobs, each of which opens first. In the tables, a job is
// a column.
func jobs() []string {
	return scale([]string{"open", "put6", "put143", "list", "check"}, []string{"put6", "list"})
}

const (
	jobNone   = "none"
	jobRun    = "run"    // a command, see runCommand
	bboltMark = "bbolt:" // begins a location
	limit     = 64 << 20 // bytes, the goal
)

func child(work string) int {
	job, location, _ := strings.Cut(work, " ")
	if job == jobRun {
		if err := runCommand(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return 0
	}
	err := doJob(job, location)
	if err == nil {
		var hwm string
		if hwm, err = highWater(); err == nil {
			fmt.Println(hwm)
			return 0
		}
	}
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// highWater returns the most KiB that this process had in RAM.
func highWater() (string, error) {
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			return strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(v), "kB")), nil
		}
	}
	return "", errors.New("no VmHWM in /proc/self/status")
}

func doJob(job, location string) error {
	if job == jobNone {
		return nil
	}
	if path, ok := strings.CutPrefix(location, bboltMark); ok {
		return bboltJob(job, path)
	}
	s, err := nvstore.Open(location, &nvstore.Options{Key: kind{sealed: true}.key(), Idle: -1})
	if err != nil {
		return err
	}
	switch job {
	case "put6", "put143":
		err = putMany(nvStore{s}, job)
	case "list":
		err = s.View(func(tx *nvstore.Tx) error {
			for _, err := range tx.List("") {
				if err != nil {
					return err
				}
			}
			return nil
		})
	case "check":
		var r *nvstore.Report
		if r, err = s.Check(context.Background(), nil); err == nil && len(r.Errors) > 0 {
			err = fmt.Errorf("check: %v", r.Errors[0])
		}
	}
	return errors.Join(err, s.Close())
}

func putMany(st store, job string) error {
	w := newWorkload(map[string]int{"put6": 6 << 10, "put143": 143 << 10}[job])
	for i := range 100 {
		if err := st.put(blobName(i%10), w.value(i)); err != nil {
			return err
		}
	}
	return nil
}

func bboltJob(job, path string) error {
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		return err
	}
	switch job {
	case "put6", "put143":
		err = putMany(bboltStore{db}, job)
	case "list":
		err = db.View(func(tx *bbolt.Tx) error {
			return tx.Bucket(bucket).ForEach(func(_, _ []byte) error { return nil })
		})
	case "check":
		err = db.View(func(tx *bbolt.Tx) error {
			for err := range tx.Check() {
				return err
			}
			return nil
		})
	}
	return errors.Join(err, db.Close())
}

// peak runs a child and returns its VmHWM in bytes.
func peak(t *testing.T, job, location string) int64 {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+job+" "+location)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	require.NoError(t, err, "%s of %s", job, location)
	var kib int64
	_, err = fmt.Sscan(string(out), &kib)
	require.NoError(t, err)
	return kib << 10
}

// A home is a place to be measured.
type home struct{ name, location string }

func memoryTables(t *testing.T) {
	dir := directory(t)
	none := peak(t, jobNone, "")
	for _, blobs := range scale([]int{10, 100_000}, []int{10, 200}) {
		sub := filepath.Join(dir, fmt.Sprint(blobs))
		memoryTable(t, fmt.Sprintf("%d blobs", blobs), none, filledHomes(t, sub, blobs))
	}
	memoryTable(t, "10 blobs, by the image's virtual size", none, largeHomes(t, dir))
}

// memoryTable has a column for each job, and the ratio of the most to the
// goal and to the first home's.
func memoryTable(t *testing.T, title string, none int64, homes []home) {
	out := &table{title: fmt.Sprintf("Peak memory in MiB, a process that does nothing: %s; %s", mib(none), title),
		columns: append(append([]string{"subject"}, jobs()...), "most", "of 64 MiB", "ratio")}
	var first int64
	for _, h := range homes {
		cells := []any{h.name}
		most := int64(0)
		for _, job := range jobs() {
			n := peak(t, job, h.location)
			cells = append(cells, mib(n))
			most = max(most, n)
		}
		if first == 0 {
			first = most
		}
		out.add(append(cells, mib(most), ratio(most, limit), ratio(most, first))...)
	}
	show(out)
}

func mib(n int64) string { return fmt.Sprintf("%.1f", float64(n)/(1<<20)) }

func filledHomes(t *testing.T, dir string, blobs int) []home {
	require.NoError(t, os.MkdirAll(dir, 0o700))
	st, err := openBbolt(dir, nil)
	require.NoError(t, err)
	require.NoError(t, st.(bboltStore).fill(blobs))
	require.NoError(t, st.close())
	homes := []home{{"bbolt", bboltMark + filepath.Join(dir, "db")}}
	for _, where := range []string{onRaw, onQCOW2} {
		k := kind{where, true}
		path := filepath.Join(dir, where)
		require.NoError(t, k.build(path, blobs, false))
		homes = append(homes, home{k.String(), path})
	}
	return homes
}

// largeHomes are sparse images. The file system may not allow quite 16 TiB.
func largeHomes(t *testing.T, dir string) (homes []home) {
	sizes := []struct {
		name string
		size int64
	}{{"1 GiB", 1 << 30}, {"1 TiB", 1 << 40}, {"16 TiB", 16<<40 - 64<<10}}
	for _, where := range []string{onRaw, onQCOW2} {
		k := kind{where, true}
		for i, size := range sizes {
			if !*tables && i > 0 && where == onRaw {
				continue // not every file system lets tests do this
			}
			path := filepath.Join(dir, fmt.Sprintf("large-%s-%d", where, i))
			o := k.options()
			o.Size = size.size
			s, err := nvstore.Create(path, o)
			require.NoError(t, err)
			require.NoError(t, fill(s, 10))
			require.NoError(t, s.Close())
			homes = append(homes, home{k.String() + " " + size.name, path})
		}
	}
	sparse := filepath.Join(dir, "tail")
	homes = append(homes, home{"sealed, last 64 MiB of a qcow2 of 16 TiB", tail(t, sparse, 0)})
	if *tables {
		used := filepath.Join(dir, "used")
		homes = append(homes, home{"the same, with all its L2 tables in use", tail(t, used, 512<<20)})
	}
	return homes
}

// tail makes a large image with a store at its end. With a stride, the image
// has a written block at each of its multiples.
func tail(t *testing.T, path string, stride int64) string {
	const size, own = 16 << 40, 64 << 20
	p, err := chain.Create(path, &chain.CreateOptions{Format: onQCOW2, Size: size})
	require.NoError(t, err)
	for off := int64(0); stride > 0 && off < size-own; off += stride {
		_, err := p.Device.WriteAt([]byte("block"), off)
		require.NoError(t, err)
	}
	require.NoError(t, p.Device.Sync())
	require.NoError(t, p.Commit())
	require.NoError(t, p.Device.Close())
	location := fmt.Sprintf("driver=raw,offset=%d,size=%d,file.driver=qcow2,file.file.filename=%s", int64(size-own), int64(own), path)
	s, err := nvstore.Create(location, &nvstore.CreateOptions{Key: kind{sealed: true}.key(), Existing: true, Idle: -1})
	require.NoError(t, err)
	require.NoError(t, fill(s, 10))
	require.NoError(t, s.Close())
	return location
}
