package bench

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

const burst = 5 // operations a turn

// A subject is one way to do what a table is about.
type subject struct {
	name string
	// open prepares it in an empty directory of its own.
	open func(dir string) (runner, error)
}

// A runner is an open subject.
type runner interface {
	// run does operation i, of which it may time a part only.
	run(i int) (sample, error)
	close() error
}

// A sample is what one operation took.
type sample struct{ wall, cpu time.Duration }

// A server does its work in another process, or a part of it.
type server interface{ cpu() (time.Duration, error) }

// timed does one operation. s may be a server.
func timed(s any, op func() error) (sample, error) {
	before, err := cpuTime(s)
	if err != nil {
		return sample{}, err
	}
	start := time.Now()
	if err := op(); err != nil {
		return sample{}, err
	}
	wall := time.Since(start)
	after, err := cpuTime(s)
	return sample{wall, after - before}, err
}

// cpuTime is the CPU time that this process, and the subject's own if it has
// one, have used.
func cpuTime(s any) (time.Duration, error) {
	var ru unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &ru); err != nil {
		return 0, err
	}
	sum := time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
	if s, ok := s.(server); ok {
		d, err := s.cpu()
		return sum + d, err
	}
	return sum, nil
}

// A row is what was measured of a subject.
type row struct {
	name string
	wall []time.Duration // of each operation, in the end sorted
	cpu  time.Duration   // of all
}

func (r *row) quantile(q float64) time.Duration {
	return r.wall[int(q*float64(len(r.wall)-1))]
}

func (r *row) median() time.Duration { return r.quantile(0.5) }

func (r *row) meanCPU() time.Duration { return r.cpu / time.Duration(len(r.wall)) }

// measure does ops operations on each of the subjects, in turns, and returns a
// row each.
func measure(t *testing.T, dir string, subjects []subject, ops int) []*row {
	t.Helper()
	return measureTurns(t, dir, subjects, ops, burst)
}

// measureTurns is measure with a number of operations a turn.
func measureTurns(t *testing.T, dir string, subjects []subject, ops, turn int) []*row {
	t.Helper()
	var rows []*row
	var runners []runner
	for i, s := range subjects {
		sub := filepath.Join(dir, fmt.Sprint(i))
		require.NoError(t, os.MkdirAll(sub, 0o700))
		r, err := s.open(sub)
		require.NoError(t, err, s.name)
		defer func() { require.NoError(t, r.close(), s.name) }()
		runners = append(runners, r)
		rows = append(rows, &row{name: s.name})
	}
	order := rand.New(rand.NewPCG(1, 1))
	for n := 0; n < ops; n += turn {
		for _, k := range order.Perm(len(runners)) {
			for i := n; i < min(n+turn, ops); i++ {
				s, err := runners[k].run(i)
				require.NoError(t, err, rows[k].name)
				rows[k].wall = append(rows[k].wall, s.wall)
				rows[k].cpu += s.cpu
			}
		}
	}
	for _, r := range rows {
		slices.Sort(r.wall)
	}
	return rows
}

// A table is printed with its columns aligned.
type table struct {
	title   string
	columns []string
	cells   [][]string
}

// add makes a line of one cell for each column. A float has two decimals.
func (t *table) add(cells ...any) {
	var line []string
	for _, c := range cells {
		if f, ok := c.(float64); ok {
			line = append(line, fmt.Sprintf("%.2f", f))
			continue
		}
		line = append(line, fmt.Sprint(c))
	}
	t.cells = append(t.cells, line)
}

func (t *table) print(w io.Writer) {
	fmt.Fprintf(w, "\n%s\n", t.title)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	for _, line := range append([][]string{t.columns}, t.cells...) {
		fmt.Fprintln(tw, strings.Join(line, "\t")+"\t")
	}
	tw.Flush()
}

// timeTable shows rows. The first is what the ratios refer to.
func timeTable(title string, rows []*row) *table {
	t := &table{title: title, columns: []string{"subject", "median µs", "p90 µs", "ratio", "CPU µs/op", "ops"}}
	for _, r := range rows {
		t.add(r.name, whole(r.median()), whole(r.quantile(0.9)), ratio(r.median(), rows[0].median()), whole(r.meanCPU()), len(r.wall))
	}
	return t
}

func whole(d time.Duration) string {
	us := float64(d) / float64(time.Microsecond)
	if us < 20 {
		return fmt.Sprintf("%.1f", us)
	}
	return fmt.Sprintf("%.0f", us)
}

func ratio[T ~int | ~int64](a, b T) float64 { return float64(a) / float64(b) }
