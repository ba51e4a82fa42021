package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"nvstore.dev/image/pebbledev"
	"nvstore.dev/nvstore"
)

// The record of nvtool torture is text, a line at a time, each flushed before
// what follows it happens:
//
//	nvstore-torture 1 SEED
//	begin N OP; OP; ...     the transaction is about to run
//	ack N                   the store acknowledged it, or it was found done
//	void N                  it was found undone after a crash
//
// A line without its newline at the end was cut off by a crash, and doesn't
// count.
const recordMagic = "nvstore-torture 1 "

// maxLayers bounds how many writes lie over each other in a blob.
const maxLayers = 8

// A layer is bytes [off, off+n) of the content that transaction tx derived
// for its operation op. Layers lie over each other; below them are zeros.
type layer struct {
	tx     int64
	op     int
	off, n int64
}

// A modelBlob is what a blob must be.
type modelBlob struct {
	size   int64
	layers []layer
}

// A state is what the store must hold.
type state map[string]*modelBlob

func (s state) clone() state {
	c := make(state, len(s))
	for name, b := range s {
		c[name] = &modelBlob{b.size, slices.Clone(b.layers)}
	}
	return c
}

// apply does to the model what a transaction does to the store.
func (s state) apply(n int64, i int, op tortureOp) error {
	b := s[op.name]
	if b == nil && op.verb != "put" {
		return fmt.Errorf("transaction %d: %s: no such blob", n, op)
	}
	switch op.verb {
	case "put":
		s[op.name] = &modelBlob{op.a, []layer{{n, i, 0, op.a}}}
	case "write":
		b.layers = append(b.layers, layer{n, i, op.a, op.b})
		b.size = max(b.size, op.a+op.b)
	case "truncate":
		for k := range b.layers {
			l := &b.layers[k]
			l.n = min(l.n, max(op.a-l.off, 0))
		}
		b.size = op.a
	case "delete":
		delete(s, op.name)
	case "rename":
		if s[op.to] != nil {
			return fmt.Errorf("transaction %d: %s: there already", n, op)
		}
		delete(s, op.name)
		s[op.to] = b
	}
	return nil
}

// derive makes the content that an operation writes.
func derive(seed uint64, n int64, op int, size int64) []byte {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	binary.LittleEndian.PutUint64(key[8:], uint64(n))
	binary.LittleEndian.PutUint64(key[16:], uint64(op))
	p := make([]byte, size)
	rand.NewChaCha8(key).Read(p)
	return p
}

func (b *modelBlob) content(seed uint64) []byte {
	p := make([]byte, b.size)
	for _, l := range b.layers {
		// A layer that was cut derives the same bytes, only fewer.
		copy(p[min(l.off, b.size):], derive(seed, l.tx, l.op, l.n))
	}
	return p
}

// A record is the file and what it says.
type record struct {
	f     *os.File // nil if only read
	seed  uint64
	state state
	acked int64 // transactions that were acknowledged
	next  int64 // number of the next transaction
	begun *transaction
	whole int64 // bytes of the lines that count
}

// recordPath is where the record of a location lies by default.
func recordPath(location string) string {
	path, folder := strings.CutPrefix(location, "pebble:")
	if folder {
		if i := strings.LastIndexByte(path, '/'); i > 0 {
			if id, err := pebbledev.ParseUUID(path[i+1:]); err == nil {
				return strings.TrimRight(path[:i], "/") + "." + id.String() + ".torture"
			}
		}
	}
	return strings.TrimRight(path, "/") + ".torture"
}

// readRecord replays a record.
func readRecord(path string) (*record, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r := &record{}
	return r, r.replay(f)
}

// openRecord replays the record to go on, or starts a new one.
func openRecord(path string, seed uint64) (*record, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	r := &record{f: f}
	if err := r.start(path, seed); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return r, nil
}

func (r *record) start(path string, seed uint64) error {
	if err := r.replay(r.f); err != nil {
		return err
	}
	if err := r.f.Truncate(r.whole); err != nil {
		return err
	}
	if _, err := r.f.Seek(r.whole, io.SeekStart); err != nil {
		return err
	}
	if r.whole > 0 {
		return nil
	}
	r.seed = seed
	if err := r.line("%s%d", recordMagic, seed); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func (r *record) close() error { return r.f.Close() }

// line appends a line, and waits until it is durable.
func (r *record) line(format string, args ...any) error {
	if _, err := fmt.Fprintf(r.f, format+"\n", args...); err != nil {
		return err
	}
	return r.f.Sync()
}

func (r *record) replay(f io.Reader) error {
	r.state, r.next = make(state), 1
	in := bufio.NewReaderSize(f, 1<<16)
	for n := 1; ; n++ {
		text, err := in.ReadString('\n')
		if err == io.EOF {
			if n == 1 && r.f == nil {
				return invalidf("the record is empty")
			}
			return nil
		}
		if err != nil {
			return err
		}
		if err := r.parse(n, strings.TrimSuffix(text, "\n")); err != nil {
			return fmt.Errorf("record, line %d: %w", n, err)
		}
		r.whole += int64(len(text))
	}
}

func (r *record) parse(n int, text string) error {
	if n == 1 {
		seed, ok := strings.CutPrefix(text, recordMagic)
		var err error
		if r.seed, err = strconv.ParseUint(seed, 10, 64); !ok || err != nil {
			return invalidf("not a record of nvtool torture")
		}
		return nil
	}
	verb, rest, _ := strings.Cut(text, " ")
	num, ops, _ := strings.Cut(rest, " ")
	k, err := strconv.ParseInt(num, 10, 64)
	if err != nil || k != r.next || (verb == "begin") != (r.begun == nil) {
		return invalidf("%q doesn't follow what comes before", text)
	}
	switch verb {
	case "begin":
		r.begun, err = parseTransaction(k, ops)
		return err
	case "ack", "void":
		return r.settle(verb == "ack")
	}
	return invalidf("%q: begin, ack or void", text)
}

func parseTransaction(n int64, text string) (*transaction, error) {
	t := &transaction{n: n}
	for part := range strings.SplitSeq(text, "; ") {
		f := strings.Fields(part)
		args := map[string]int{"put": 3, "write": 4, "truncate": 3, "delete": 2, "rename": 3}
		if len(f) == 0 || len(f) != args[f[0]] {
			return nil, invalidf("operation %q", part)
		}
		op := tortureOp{verb: f[0], name: f[1]}
		var err error
		switch f[0] {
		case "rename":
			op.to = f[2]
		case "write":
			op.b, err = parseSize(f[3])
			if err == nil && op.b > 1<<20 {
				err = invalidf("operation %q", part)
			}
			fallthrough
		case "put", "truncate":
			var e error
			op.a, e = parseSize(f[2])
			if err = errors.Join(err, e); err == nil && op.a > 1<<20 {
				err = invalidf("operation %q", part)
			}
		}
		if err != nil {
			return nil, err
		}
		t.ops = append(t.ops, op)
	}
	return t, nil
}

// settle ends the transaction that had begun, in the model.
func (r *record) settle(done bool) error {
	if done {
		for i, op := range r.begun.ops {
			if err := r.state.apply(r.begun.n, i, op); err != nil {
				return err
			}
		}
		r.acked++
	}
	r.next, r.begun = r.begun.n+1, nil
	return nil
}

// begin says which transaction is about to run.
func (r *record) begin(t *transaction) error {
	ops := make([]string, len(t.ops))
	for i, op := range t.ops {
		ops[i] = op.String()
	}
	r.begun = t
	return r.line("begin %d %s", t.n, strings.Join(ops, "; "))
}

// resolve says how the transaction that had begun ended.
func (r *record) resolve(done bool) error {
	if r.begun == nil {
		return nil
	}
	word := map[bool]string{true: "ack", false: "void"}[done]
	if err := r.line("%s %d", word, r.begun.n); err != nil {
		return err
	}
	return r.settle(done)
}

// apply runs a transaction on the store.
func (r *record) apply(tx *nvstore.Tx, t *transaction) error {
	for i, op := range t.ops {
		var err error
		switch op.verb {
		case "put":
			err = tx.Put(op.name, derive(r.seed, t.n, i, op.a), &nvstore.Meta{Writer: "nvtool torture"})
		case "write":
			_, err = tx.WriteAt(op.name, derive(r.seed, t.n, i, op.b), op.a)
		case "truncate":
			err = tx.Truncate(op.name, op.a)
		case "delete":
			err = tx.Delete(op.name)
		case "rename":
			err = tx.Rename(op.name, op.to)
		}
		if err != nil {
			return fmt.Errorf("transaction %d: %s: %w", t.n, op, err)
		}
	}
	return nil
}

// outcome compares the store with the record: it must hold what the last
// acknowledged transaction left, or that and the one that had begun, and done
// tells which.
func (r *record) outcome(s *nvstore.Store) (done bool, err error) {
	before, err := r.differs(s, r.state)
	if err != nil || before == "" {
		return false, err
	}
	if r.begun == nil {
		return false, &kinded{fmt.Errorf("after transaction %d: %s", r.next-1, before), errLost}
	}
	after := r.state.clone()
	for i, op := range r.begun.ops {
		if err := after.apply(r.begun.n, i, op); err != nil {
			return false, err
		}
	}
	why, err := r.differs(s, after)
	if err != nil || why == "" {
		return true, err
	}
	return false, &kinded{fmt.Errorf("neither before transaction %d (%s) nor after it (%s)", r.begun.n, before, why), errLost}
}

// differs says how the store differs from a state, or "".
func (r *record) differs(s *nvstore.Store, want state) (why string, err error) {
	err = s.View(func(tx *nvstore.Tx) error {
		have := make(map[string]bool)
		for e, err := range tx.List(torturePrefix) {
			if err != nil {
				return err
			}
			have[e.Name] = true
			b := want[e.Name]
			if b == nil {
				why = fmt.Sprintf("%s shouldn't be there", e.Name)
				return nil
			}
			if e.Size != b.size {
				why = fmt.Sprintf("%s has %d bytes, want %d", e.Name, e.Size, b.size)
				return nil
			}
			got, err := tx.Get(e.Name, 0)
			if err != nil {
				return err
			}
			if !bytes.Equal(got, b.content(r.seed)) {
				why = fmt.Sprintf("%s has other content", e.Name)
				return nil
			}
		}
		for _, name := range slices.Sorted(maps.Keys(want)) {
			if !have[name] {
				why = fmt.Sprintf("%s is missing", name)
				return nil
			}
		}
		return nil
	})
	return why, err
}
