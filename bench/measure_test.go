package bench

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

const (
	numKeys   = 8
	numValues = 16
	burst     = 5 // operations a turn
)

// A workload is what all subjects of a table do.
type workload struct {
	size   int      // of a value in bytes
	values [][]byte // random, all different
	ops    int      // for each subject
}

func newWorkload(size, ops int) *workload {
	w := &workload{size: size, ops: ops}
	r := rand.NewChaCha8([32]byte{1})
	for range numValues {
		v := make([]byte, size)
		_, _ = r.Read(v)
		w.values = append(w.values, v)
	}
	return w
}

func key(i int) string { return fmt.Sprintf("blob/%d", i%numKeys) }

// A subject is one way to make a value durable.
type subject struct {
	name string
	// open prepares it in an empty directory of its own.
	open func(dir string, w *workload) (store, error)
}

// A store is an open subject. put returns when the value is durable.
type store interface {
	put(key string, value []byte) error
	close() error
}

// A server is a store that does its work in another process.
type server interface{ cpu() (time.Duration, error) }

// A row is what was measured of a subject.
type row struct {
	name string
	wall []time.Duration // of each operation, in the end sorted
	cpu  time.Duration   // of all
}

func (r *row) quantile(q float64) time.Duration {
	return r.wall[int(q*float64(len(r.wall)-1))]
}

// measure runs a workload on all subjects, in turns, and returns a row each.
func measure(t *testing.T, dir string, subjects []subject, w *workload) []*row {
	t.Helper()
	var rows []*row
	var stores []store
	for i, s := range subjects {
		sub := filepath.Join(dir, fmt.Sprint(i))
		require.NoError(t, os.MkdirAll(sub, 0o700))
		st, err := s.open(sub, w)
		require.NoError(t, err, s.name)
		defer func() { require.NoError(t, st.close(), s.name) }()
		for k := range numKeys { // so that what is measured overwrites
			require.NoError(t, st.put(key(k), w.values[k]), s.name)
		}
		stores = append(stores, st)
		rows = append(rows, &row{name: s.name})
	}
	for n := 0; n < w.ops; n += burst {
		for i, st := range stores {
			require.NoError(t, turn(st, w, n, rows[i]), rows[i].name)
		}
	}
	for _, r := range rows {
		slices.Sort(r.wall)
	}
	return rows
}

// turn does one burst.
func turn(st store, w *workload, n int, r *row) error {
	before, err := cpuTime(st)
	if err != nil {
		return err
	}
	for i := n; i < min(n+burst, w.ops); i++ {
		// 8 and 16 would pair each key with two values for ever.
		v := w.values[(i*7+i/numKeys)%numValues]
		start := time.Now()
		if err := st.put(key(i), v); err != nil {
			return err
		}
		r.wall = append(r.wall, time.Since(start))
	}
	after, err := cpuTime(st)
	r.cpu += after - before
	return err
}

// cpuTime is the CPU time that this process, and the store's own if it has one,
// have used.
func cpuTime(st store) (time.Duration, error) {
	var ru unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &ru); err != nil {
		return 0, err
	}
	sum := time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
	if s, ok := st.(server); ok {
		d, err := s.cpu()
		return sum + d, err
	}
	return sum, nil
}

// print writes a table. The first row is what the ratios refer to.
func print(w io.Writer, title string, rows []*row) {
	fmt.Fprintf(w, "\n%s\n", title)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "subject\tmedian µs\tp90 µs\tratio\tCPU µs/op\tops\t")
	base := rows[0].quantile(0.5)
	for _, r := range rows {
		fmt.Fprintf(tw, "%s\t%.0f\t%.0f\t%.2f\t%.0f\t%d\t\n", r.name, micros(r.quantile(0.5)), micros(r.quantile(0.9)),
			float64(r.quantile(0.5))/float64(base), micros(r.cpu)/float64(len(r.wall)), len(r.wall))
	}
	tw.Flush()
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
