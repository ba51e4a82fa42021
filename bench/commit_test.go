package bench

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image/imagetest"
	"nvstore.dev/nvstore"
)

// numTargets is how many of a store's blobs take turns in being put.
const numTargets = 32

// A cost is what commits took of a file, of each kind the mean and the most.
type cost struct {
	bytes, writes, syncs mean
}

type mean struct{ n, sum, most int64 }

func (m *mean) add(v int64) { m.n, m.sum, m.most = m.n+1, m.sum+v, max(m.most, v) }

func (m mean) String() string {
	if m.n == 0 {
		return "-"
	}
	v := float64(m.sum) / float64(m.n)
	if v < 100 {
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.0f", v)
}

func (m mean) max() string {
	if m.n == 0 {
		return "-"
	}
	return fmt.Sprint(m.most)
}

// commitCosts measures puts to a store that has a number of blobs.
func commitCosts(k kind, blobs, commits int, loads []*workload) ([]cost, error) {
	s, dev, err := counted(k)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	r := rand.New(rand.NewPCG(3, uint64(blobs)))
	if err := fill(s, blobs); err != nil {
		return nil, err
	}
	if err := churn(s, r, blobs, 200); err != nil {
		return nil, err
	}
	var list []cost
	for _, w := range loads {
		c, err := putCosts(s, dev, r, blobs, commits, w)
		if err != nil {
			return nil, err
		}
		list = append(list, c)
	}
	return list, nil
}

// putCosts puts whole values to some of the blobs, again and again, with
// random changes in between.
func putCosts(s *nvstore.Store, dev *imagetest.FaultDevice, r *rand.Rand, blobs, commits int, w *workload) (c cost, err error) {
	targets := r.Perm(blobs)[:min(numTargets, blobs)]
	for i := range len(targets) + commits {
		if i%8 == 0 {
			if err := churn(s, r, blobs, 1); err != nil {
				return c, err
			}
		}
		name := blobName(targets[i%len(targets)])
		before := dev.Trace()
		if err := s.Put(name, w.values[(i+i/len(targets))%numValues], nil); err != nil {
			return c, err
		}
		if i >= len(targets) { // before that they had another size
			d := dev.Trace().Sub(before)
			c.bytes.add(d.BytesWritten + d.BytesZeroed)
			c.writes.add(d.Writes + d.ZeroWrites)
			c.syncs.add(d.Syncs)
		}
	}
	return c, nil
}

// TestCommitCost holds a commit to its promises: one Sync of the device, and
// at 100 000 blobs 64 KiB for a Put of 6 KiB. With -short, and under the race
// detector, which makes filling the store ten times as slow, it has 10 000.
func TestCommitCost(t *testing.T) {
	for _, blobs := range []int{10, 1000, many()} {
		start := time.Now()
		costs, err := commitCosts(kind{onRaw, true}, blobs, 200, []*workload{newWorkload(6 << 10), newWorkload(143 << 10)})
		require.NoError(t, err)
		for i, c := range costs {
			t.Logf("%d blobs, put of %s: bytes %s (max %s), writes %s (max %s), Syncs %s", blobs, sizes[i].name, c.bytes, c.bytes.max(),
				c.writes, c.writes.max(), c.syncs)
			require.Equal(t, c.syncs.n, c.syncs.sum, "Syncs")
			require.EqualValues(t, 1, c.syncs.most, "Syncs of one commit")
		}
		require.LessOrEqual(t, costs[0].bytes.most, int64(64<<10), "bytes that a put of 6 KiB wrote, with %d blobs", blobs)
		t.Logf("took %v", time.Since(start).Round(time.Millisecond))
	}
}

func many() int {
	if testing.Short() || raceDetector {
		return 10_000
	}
	return 100_000
}

func commitTable(t *testing.T) {
	out := &table{title: "What a commit writes", columns: []string{
		"blobs", "value", "subject", "bytes", "max", "bytes/value", "of bbolt's", "writes", "Syncs", "max"}}
	loads := []*workload{newWorkload(6 << 10), newWorkload(143 << 10)}
	for _, blobs := range scale([]int{10, 10_000, 100_000}, []int{10, 500}) {
		costs := make(map[string][]cost)
		subjects := []string{"bbolt", "sqlite3 WAL FULL"}
		for _, k := range []kind{{onRaw, true}, {onRaw, false}, {onQCOW2, true}} {
			name := k.String()
			if k.home == onQCOW2 {
				name += ", its file"
			}
			subjects = append(subjects, name)
			c, err := commitCosts(k, blobs, scale(400, 20), loads)
			require.NoError(t, err, name)
			costs[name] = c
		}
		costs["bbolt"] = peerCosts(t, blobs, loads, bboltPeer)
		costs["sqlite3 WAL FULL"] = peerCosts(t, blobs, loads, sqlitePeer)
		for i, w := range loads {
			base := costs["bbolt"][i].bytes
			for _, name := range subjects {
				c := costs[name][i]
				out.add(blobs, fmt.Sprintf("%d KiB", w.size>>10), name, c.bytes, c.bytes.max(),
					float64(c.bytes.sum)/float64(c.bytes.n)/float64(w.size), float64(c.bytes.sum)*float64(base.n)/float64(c.bytes.n)/float64(base.sum),
					c.writes, c.syncs, c.syncs.max())
			}
		}
	}
	show(out)
}

// A peer is a filled store of another kind. pid is the process that writes
// its file, and own is how many of that process' writes in an operation aren't
// to the file.
type peer struct {
	store
	pid       string
	ownWrites int64
	ownBytes  int64
}

// peerCosts counts as the kernel does, which tells nothing of Syncs: by their
// documentation, bbolt syncs twice a commit, and SQLite once and at
// checkpoints.
func peerCosts(t *testing.T, blobs int, loads []*workload, open func(dir string, blobs int, w *workload) (*peer, error)) (list []cost) {
	for _, w := range loads {
		p, err := open(directory(t), blobs, w)
		require.NoError(t, err)
		c := &cost{}
		targets := rand.New(rand.NewPCG(3, uint64(blobs))).Perm(blobs)[:min(numTargets, blobs)]
		for i := range len(targets) + scale(400, 20) {
			bytes, writes, err := ioOf(p.pid)
			require.NoError(t, err)
			require.NoError(t, p.put(blobName(targets[i%len(targets)]), w.values[(i+i/len(targets))%numValues]))
			bytesAfter, writesAfter, err := ioOf(p.pid)
			require.NoError(t, err)
			if i >= len(targets) {
				c.bytes.add(bytesAfter - bytes - p.ownBytes)
				c.writes.add(writesAfter - writes - p.ownWrites)
			}
		}
		require.NoError(t, p.close())
		list = append(list, *c)
	}
	return list
}

// ioOf returns what a process has written, from proc_pid_io.
func ioOf(pid string) (bytes, writes int64, err error) {
	f, err := os.Open(filepath.Join("/proc", pid, "io"))
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		name, value, _ := strings.Cut(sc.Text(), ": ")
		switch name {
		case "wchar":
			_, err = fmt.Sscan(value, &bytes)
		case "syscw":
			_, err = fmt.Sscan(value, &writes)
		}
		if err != nil {
			return 0, 0, err
		}
	}
	return bytes, writes, nil
}

func bboltPeer(dir string, blobs int, w *workload) (*peer, error) {
	st, err := openBbolt(dir, w)
	if err != nil {
		return nil, err
	}
	return &peer{store: st, pid: "self"}, st.(bboltStore).fill(blobs)
}

// sqlitePeer's process writes "done\n" to us as well.
func sqlitePeer(dir string, blobs int, w *workload) (*peer, error) {
	s, err := startSQLite(filepath.Join(dir, "db"), w)
	if err != nil {
		return nil, err
	}
	return &peer{store: s, pid: fmt.Sprint(s.cmd.Process.Pid), ownWrites: 1, ownBytes: 5}, s.fill(blobs)
}
