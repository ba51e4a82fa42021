package imagetest

import (
	"fmt"
	"strings"
)

// An OpKind is a kind of operation on a Device. Kinds are bits, so that a
// Fault can name several.
type OpKind uint

const (
	OpRead OpKind = 1 << iota
	OpWrite
	OpSync
	OpResize
	OpDiscard
	OpWriteZeroes
	OpDropCache
	OpRevert // CrashDevice.Revert; never a Fault's

	OpAny    = OpRead | OpChange | OpSync | OpDropCache
	OpChange = OpWrite | OpResize | OpDiscard | OpWriteZeroes
)

var opNames = []string{"read", "write", "sync", "resize", "discard", "write zeroes", "drop cache", "revert"}

func (k OpKind) String() string {
	var s []string
	for i, name := range opNames {
		if k&(1<<i) != 0 {
			s = append(s, name)
		}
	}
	return strings.Join(s, "|")
}

// An Op is one operation that a CrashDevice logged. Operations that were
// refused aren't logged; nor are reads.
type Op struct {
	Kind OpKind
	Off  int64  // first byte; 0 for a Sync
	Len  int64  // bytes; the new size for a Resize
	Data []byte // of a write; not to be changed
	Lost bool   // a Sync that failed

	secs []sectorWrite
}

func (o Op) String() string {
	switch {
	case o.Kind == OpSync && o.Lost:
		return "failed sync"
	case o.Kind == OpSync, o.Kind == OpRevert:
		return o.Kind.String()
	case o.Kind == OpResize:
		return fmt.Sprintf("resize to %d", o.Len)
	}
	return fmt.Sprintf("%v [%#x, %#x)", o.Kind, o.Off, o.Off+o.Len)
}

// A sectorWrite is what a sector holds after an operation.
type sectorWrite struct {
	sector int64
	data   []byte // 512 bytes, or nil for zeros
}

// A Trace counts operations that were asked for, and the bytes they covered.
type Trace struct {
	Reads, Writes, Syncs, Resizes, Discards, ZeroWrites, CacheDrops int64

	BytesRead, BytesWritten, BytesDiscarded, BytesZeroed int64
}

func (t *Trace) count(k OpKind, n int64) {
	switch k {
	case OpRead:
		t.Reads++
		t.BytesRead += n
	case OpWrite:
		t.Writes++
		t.BytesWritten += n
	case OpSync:
		t.Syncs++
	case OpResize:
		t.Resizes++
	case OpDiscard:
		t.Discards++
		t.BytesDiscarded += n
	case OpWriteZeroes:
		t.ZeroWrites++
		t.BytesZeroed += n
	case OpDropCache:
		t.CacheDrops++
	}
}

// Sub returns what was counted since the Trace before was taken.
func (t Trace) Sub(before Trace) Trace {
	t.Reads -= before.Reads
	t.Writes -= before.Writes
	t.Syncs -= before.Syncs
	t.Resizes -= before.Resizes
	t.Discards -= before.Discards
	t.ZeroWrites -= before.ZeroWrites
	t.CacheDrops -= before.CacheDrops
	t.BytesRead -= before.BytesRead
	t.BytesWritten -= before.BytesWritten
	t.BytesDiscarded -= before.BytesDiscarded
	t.BytesZeroed -= before.BytesZeroed
	return t
}
