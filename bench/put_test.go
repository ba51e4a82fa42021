package bench

import (
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
	"time"
)

const (
	numKeys   = 8
	numValues = 16
	numWarm   = 8 // times that each key is put before anything counts, in earnest
)

// A workload is what all subjects of a table put.
type workload struct {
	size   int      // of a value in bytes
	values [][]byte // random, all different
}

func newWorkload(size int) *workload {
	w := &workload{size: size}
	r := rand.NewChaCha8([32]byte{1})
	for range numValues {
		v := make([]byte, size)
		_, _ = r.Read(v)
		w.values = append(w.values, v)
	}
	return w
}

func key(i int) string { return fmt.Sprintf("blob/%d", i%numKeys) }

// value is what operation i puts. 8 keys and 16 values would pair each key
// with two values for ever.
func (w *workload) value(i int) []byte { return w.values[(i*7+i/numKeys)%numValues] }

// subject makes a subject of a store.
func (w *workload) subject(name string, open opener) subject {
	return subject{name, func(dir string) (runner, error) {
		st, err := open(dir, w)
		if err != nil {
			return nil, err
		}
		for i := range numKeys * scale(numWarm, 1) {
			if err := st.put(key(i), w.value(i)); err != nil {
				return nil, err
			}
		}
		return &putter{st, w}, nil
	}}
}

type putter struct {
	store
	w *workload
}

func (p *putter) run(i int) (sample, error) {
	return timed(p.store, func() error { return p.put(key(i), p.w.value(i)) })
}

// Names of the subjects that the goals are about.
const (
	samePwrite   = "pwrite+fdatasync"
	commitPwrite = "pwrite+fdatasync, a commit's bytes"
)

func putSubjects(w *workload, commitBytes int) []subject {
	list := []subject{
		w.subject(samePwrite, openPwrite),
		w.subject(commitPwrite, pwriteOf(commitBytes, false)),
		w.subject(commitPwrite+" in two places", pwriteOf(commitBytes, true)),
	}
	for _, k := range []kind{{onRaw, true}, {onRaw, false}, {onQCOW2, true}, {onQCOW2, false}, {onPebble, true}, {onPebble, false}} {
		list = append(list, w.subject(k.String(), k.opener))
	}
	return append(list,
		w.subject("write+fsync+rename+fsync(dir)", openRename),
		w.subject("bbolt", openBbolt),
		w.subject("sqlite3 WAL FULL", openSQLite),
		w.subject("pebble folder, device alone", openPebble),
	)
}

var sizes = []struct {
	name  string
	bytes int
}{
	{"6 KiB, a TPM's permanent state", 6 << 10},
	{"143 KiB, a TPM with its NV memory full", 143 << 10},
}

func putTables(t *testing.T) {
	for _, size := range sizes {
		w := newWorkload(size.bytes)
		bytes, err := commitBytes(w)
		if err != nil {
			t.Fatal(err)
		}
		rows := measure(t, directory(t), putSubjects(w, bytes), scale(600, 10))
		title := fmt.Sprintf("Durable put of %s; a sealed commit writes %d bytes", size.name, bytes)
		show(timeTable(title, rows), putGoals(rows, size.bytes <= 6<<10))
	}
}

// commitBytes is what a sealed commit on raw writes once the store is warm.
func commitBytes(w *workload) (int, error) {
	s, dev, err := counted(kind{onRaw, true})
	if err != nil {
		return 0, err
	}
	defer s.Close()
	const n = numKeys * 8
	var sum int64
	for i := range 2 * n {
		before := dev.Trace()
		if err := s.Put(key(i), w.value(i), nil); err != nil {
			return 0, err
		}
		if i >= n {
			sum += dev.Trace().Sub(before).BytesWritten
		}
	}
	return int(sum / n), nil
}

// putGoals sets the sealed store on raw against what it may take. Only a small
// put has to keep up with a single write.
func putGoals(rows []*row, small bool) *table {
	by := make(map[string]*row)
	for _, r := range rows {
		by[r.name] = r
	}
	ours, base := by[kind{onRaw, true}.String()], by[commitPwrite]
	t := &table{title: "Goals of " + ours.name + " (1 and below is met)", columns: []string{"goal", "has µs", "may µs", "ratio"}}
	const cpu = 60 * time.Microsecond
	may := base.median()*13/10 + cpu
	if small {
		t.add("wall: 1.3 × "+base.name+" + 60 µs", whole(ours.median()), whole(may), ratio(ours.median(), may))
		t.add("CPU: as "+base.name+" + 60 µs", whole(ours.meanCPU()), whole(base.meanCPU()+cpu), ratio(ours.meanCPU(), base.meanCPU()+cpu))
	}
	for _, name := range []string{"write+fsync+rename+fsync(dir)", "bbolt", "sqlite3 WAL FULL"} {
		t.add("faster than "+name, whole(ours.median()), whole(by[name].median()), ratio(ours.median(), by[name].median()))
	}
	return t
}

// show prints in earnest only.
func show(list ...*table) {
	if !*tables {
		return
	}
	for _, t := range list {
		t.print(os.Stdout)
	}
}
