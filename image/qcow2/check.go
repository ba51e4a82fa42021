package qcow2

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"slices"

	"nvstore.dev/image"
)

// CheckOptions are the options of Check. Nil means the zero value.
type CheckOptions struct {
	// Memory is for counting references, in bytes; 0 means 32 MiB, or what
	// an L1 table of many MiB leaves of 64. Each cluster of the file takes
	// 4; where that is more than Memory, all tables are read several times.
	Memory int64

	// MaxFindings bounds Findings; 0 means 1000.
	MaxFindings int

	// Data also unpacks each compressed cluster, those of snapshots
	// included.
	Data bool
}

// A CheckResult says what is wrong with an image. Without errors, all its data
// can be reached and writing to it is safe. Leaks only waste space. The JSON
// keys are those of qemu-img check.
type CheckResult struct {
	// CheckErrors is 0: what can't be checked is an error of Check.
	CheckErrors int64 `json:"check-errors"`

	Errors      int64 `json:"corruptions,omitempty"`
	Leaks       int64 `json:"leaks,omitempty"` // clusters
	ErrorsFixed int64 `json:"corruptions-fixed,omitempty"`
	LeaksFixed  int64 `json:"leaks-fixed,omitempty"`

	ImageEnd   int64 `json:"image-end-offset,omitempty"`    // end of the last cluster in use, in bytes
	Total      int64 `json:"total-clusters,omitempty"`      // of the disk
	Allocated  int64 `json:"allocated-clusters,omitempty"`  // of the active disk
	Fragmented int64 `json:"fragmented-clusters,omitempty"` // of these, not behind the one before
	Compressed int64 `json:"compressed-clusters,omitempty"` // likewise

	// Findings are the first errors and leaks; Fixed are those that
	// Repair found and that are gone.
	Findings []Finding `json:"findings,omitempty"`
	Fixed    []Finding `json:"fixed,omitempty"`
}

// A Finding is one error, or a run of leaked clusters.
type Finding struct {
	// Code is one of header, dirty, corrupt, snapshot, refcount-table,
	// l1-entry, l2-entry, copied, refcount, overlap, outside, bitmaps,
	// encryption, compressed, leak.
	Code    string `json:"code"`
	Where   int64  `json:"where"` // byte in the file, or -1
	Message string `json:"message"`
	Error   bool   `json:"error"` // no leak
}

// Check compares refcounts with references, over the active disk and all
// snapshots, and looks for entries that the specification doesn't allow. On an
// image open for writing it writes out metadata first, and requests that write
// wait. The
// error says why the check couldn't be done; what it found is in the result.
// It stops when ctx is done.
func (im *Image) Check(ctx context.Context, o *CheckOptions) (*CheckResult, error) {
	if im.ro {
		im.mu.RLock()
		defer im.mu.RUnlock()
	} else {
		im.mu.Lock()
		defer im.mu.Unlock()
	}
	if im.opts.Snapshot != "" {
		return nil, fmt.Errorf("qcow2: checking an image that shows a snapshot: %w", image.ErrUnsupported)
	}
	if err := im.usable(!im.ro); err != nil {
		return nil, err
	}
	if !im.ro {
		if err := im.flushAside(); err != nil {
			return nil, err
		}
	}
	return im.check(ctx, o)
}

// A checker holds the state of one Check.
type checker struct {
	*Image
	ctx   context.Context
	o     CheckOptions
	res   *CheckResult
	inUse uint64 // clusters of the file, the last may be incomplete
	end   uint64 // clusters to count
	l1s   []l1Table
	table []byte // buffer of one cluster
	leaks []leak

	copied     int64               // errors that are wrong copied flags
	counts     int64               // errors that are refcounts
	marks      int64               // errors that are the dirty and the corrupt bit
	lastHost   uint64              // where the next cluster is, unless it is fragmented
	overlaps   map[uint64]struct{} // clusters of more than one use, as far as remembered
	free       []span              // clusters that nothing refers to, likewise
	badBitmaps bool
	packed     bool     // there are compressed clusters, maybe in snapshots only
	build      *rebuild // new refcounts in the making

	// The window of clusters whose references are counted at the moment.
	first  bool // pass, which reports entries
	lo, hi uint64
	refs   []uint32
}

// An l1Table is the active L1 table or a snapshot's.
type l1Table struct {
	off, n uint64 // n entries
	name   string // of the snapshot
	active bool
}

func (im *Image) check(ctx context.Context, o *CheckOptions) (*CheckResult, error) {
	c, err := im.runCheck(ctx, o)
	if err != nil {
		return nil, err
	}
	return c.res, nil
}

func (im *Image) runCheck(ctx context.Context, o *CheckOptions) (*checker, error) {
	if o == nil {
		o = &CheckOptions{}
	}
	c := &checker{Image: im, ctx: ctx, o: *o, res: &CheckResult{},
		inUse: im.geo.clusters(uint64(im.file.Size())), table: make([]byte, im.geo.cs),
		overlaps: make(map[uint64]struct{})}
	// A compressed cluster may reach past the end of the file a little.
	c.end = c.inUse + 1
	c.res.Total = int64(im.geo.clusters(im.hdr.size))
	if c.o.Memory <= 0 {
		c.o.Memory = im.room(32 << 20)
	}
	if c.o.MaxFindings <= 0 {
		c.o.MaxFindings = 1000
	}
	c.checkHeader()
	c.checkEncryption()
	c.checkSnapshots()
	c.checkReftable()
	for _, step := range []func() error{c.checkL1s, c.checkActive, c.countAll, c.checkBehind} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func (c *checker) add(f Finding, n int64) {
	if f.Error {
		c.res.Errors += n
	} else {
		c.res.Leaks += n
	}
	if len(c.res.Findings) < c.o.MaxFindings {
		c.res.Findings = append(c.res.Findings, f)
	}
}

func (c *checker) bad(code string, where uint64, format string, args ...any) {
	c.add(Finding{code, int64(where), fmt.Sprintf(format, args...), true}, 1)
}

func (c *checker) checkHeader() {
	for _, d := range c.hdr.defects {
		c.bad("header", uint64(d.Off), "%s is %v, want %s", d.Field, d.Got, d.Want)
	}
	for _, d := range c.hdr.lost {
		code := "refcount-table"
		if d.Field == "nb_snapshots" {
			code = "snapshot"
		}
		c.bad(code, uint64(d.Off), "%s is %v, want %s", d.Field, d.Got, d.Want)
	}
	if c.hdr.incompat&incompatDirty != 0 && !c.marked {
		c.marks++
		c.bad("dirty", 72, "the dirty bit is set: refcounts may be wrong")
	}
	if c.hdr.incompat&incompatCorrupt != 0 {
		c.marks++
		c.bad("corrupt", 72, "the corrupt bit is set")
	}
	if _, ok := findExtension(c.hdr.exts, extBitmaps); !ok && c.hdr.autoclear&autoclearBitmaps != 0 {
		c.bad("bitmaps", 88, "the bitmaps bit is set, but there is no bitmaps extension")
	}
}

// encryptionHeader returns where the header of full disk encryption lies.
func (h *header) encryptionHeader() (off, n uint64) {
	if x, ok := findExtension(h.exts, extEncryption); ok {
		off, n = binary.BigEndian.Uint64(x.Data), binary.BigEndian.Uint64(x.Data[8:])
	}
	return off, n
}

func (c *checker) checkEncryption() {
	off, n := c.hdr.encryptionHeader()
	if _, ok := findExtension(c.hdr.exts, extEncryption); ok != (c.hdr.crypt == 2) {
		c.bad("encryption", 32, "encryption method %d, and an encryption header: %t", c.hdr.crypt, ok)
	}
	if n > 0 && !c.inside(off, n) {
		c.bad("encryption", off, "encryption header of %d bytes at %#x", n, off)
	}
}

// inside tells whether n bytes at off are clusters of the file that can hold a
// structure.
func (c *checker) inside(off, n uint64) bool {
	return c.geo.checkTable(off, n) == "" && c.geo.clusters(off+n) <= c.inUse
}

// checkSnapshots checks the entries and collects the L1 tables that can be
// read. Those that overlap each other are left out: nothing is read twice, so
// the time is bounded by the size of the file.
func (c *checker) checkSnapshots() {
	c.l1s = []l1Table{{off: c.hdr.l1Off, n: uint64(c.hdr.l1Size), active: true}}
	ids := make(map[string]bool)
	for _, s := range c.snaps {
		if ids[s.id] {
			c.bad("snapshot", uint64(s.at), "a second snapshot with ID %q", s.id)
		}
		ids[s.id] = true
		if c.geo.version >= 3 && len(s.extra) < 16 {
			c.bad("snapshot", uint64(s.at), "snapshot %q: extra data of %d bytes, want at least 16", s.name, len(s.extra))
		}
		n := uint64(s.l1Size) * 8
		if n > maxL1Bytes || n > 0 && !c.inside(s.l1Off, n) || c.geo.checkTable(s.l1Off, n) != "" {
			c.bad("snapshot", uint64(s.at), "snapshot %q: L1 table of %d entries at %#x", s.name, s.l1Size, s.l1Off)
			continue
		}
		if size := s.diskSize(c.hdr.size); c.geo.l1Entries(size) > uint64(s.l1Size) {
			c.bad("snapshot", uint64(s.at), "snapshot %q: L1 table of %d entries for %d bytes", s.name, s.l1Size, size)
		}
		c.l1s = append(c.l1s, l1Table{off: s.l1Off, n: uint64(s.l1Size), name: s.name})
	}
	rest := c.l1s[1:]
	slices.SortStableFunc(rest, func(a, b l1Table) int { return cmp.Compare(a.off, b.off) })
	end := uint64(0)
	c.l1s = slices.DeleteFunc(c.l1s, func(t l1Table) bool {
		if t.active || t.n == 0 {
			return false
		}
		if t.off < end || t.off < c.hdr.l1Off+uint64(c.hdr.l1Size)*8 && c.hdr.l1Off < t.off+t.n*8 {
			c.bad("overlap", t.off, "the L1 table of snapshot %q overlaps another one", t.name)
			return true
		}
		end = c.geo.clusters(t.off+t.n*8) << c.geo.bits
		return false
	})
}

func (c *checker) checkReftable() {
	for i, e := range c.reftable {
		at := c.hdr.reftableOff + uint64(i)*8
		switch {
		case e == 0 || c.blockOK(e):
		case e&(sector-1) != 0:
			c.bad("refcount-table", at, "entry %#x has reserved bits set", e)
		default:
			c.bad("refcount-table", at, "entry %#x isn't a cluster of the file", e)
		}
	}
}

// blockOK tells whether e, an entry of the refcount table, can be followed.
func (c *checker) blockOK(e uint64) bool {
	return e != 0 && e&(c.geo.cs-1) == 0 && e>>c.geo.bits < c.inUse
}

// tableOK tells whether an L1 entry can be followed.
func (c *checker) tableOK(e uint64) (uint64, bool) {
	off, bad := c.geo.decodeL1(e)
	return off, off != 0 && (bad == nil || !bad.fatal) && off>>c.geo.bits < c.inUse
}

// eachL1 calls do with every entry of t that isn't 0.
func (c *checker) eachL1(t l1Table, do func(at, e uint64) error) error {
	const step = 8192
	for i := uint64(0); i < t.n; i += step {
		entries := c.l1
		if !t.active {
			var err error
			if entries, err = c.readEntries(t.off+i*8, min(step, t.n-i)); err != nil {
				return err
			}
		} else {
			entries = entries[i:min(i+step, t.n)]
		}
		for k, e := range entries {
			if e == 0 {
				continue
			}
			if err := do(t.off+(i+uint64(k))*8, e); err != nil {
				return err
			}
		}
		if err := c.ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

// checkL1s reports L1 entries that aren't as they should be.
func (c *checker) checkL1s() error {
	for _, t := range c.l1s {
		err := c.eachL1(t, func(at, e uint64) error {
			off, bad := c.geo.decodeL1(e)
			if bad != nil {
				c.bad("l1-entry", at, "entry %#x, want %s", e, bad.want)
			} else if off>>c.geo.bits >= c.inUse {
				c.bad("outside", at, "L2 table at %#x, past the end of the file", off)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// checkActive checks the copied flags, which count in the active tables only.
func (c *checker) checkActive() error {
	return c.eachL1(c.l1s[0], func(at, e uint64) error {
		off, ok := c.tableOK(e)
		if !ok {
			return nil
		}
		rc, err := c.refcount(off >> c.geo.bits)
		if err != nil {
			return err
		}
		c.checkCopied(at, "L2 table", off, rc, e&flagCopied != 0)
		if err := readFile(c.file, c.table, off); err != nil {
			return err
		}
		c.lastHost = 0
		for i := range c.geo.l2Entries() {
			v := c.geo.get(c.table, i)
			if v == (l2Entry{}) {
				continue
			}
			if err := c.checkEntry(off+i*c.geo.entrySize(), v); err != nil {
				return err
			}
			guest := ((at-c.l1s[0].off)/8<<c.geo.l2Bits + i) << c.geo.bits
			if x, bad := c.geo.decode(v); c.geo.external && bad == nil && x.placed && x.host != guest {
				c.bad("l2-entry", off+i*c.geo.entrySize(), "entry %#x, want the disk's own offset %#x, as there is a data file", v.word, guest)
			}
		}
		return c.ctx.Err()
	})
}

func (c *checker) checkEntry(at uint64, v l2Entry) error {
	e, bad := c.geo.decode(v)
	if bad != nil && bad.fatal {
		return nil // reported where references are counted
	}
	switch {
	case e.placed:
		c.res.Allocated++
		if c.lastHost != 0 && e.host != c.lastHost {
			c.res.Fragmented++
		}
		c.lastHost = e.host + c.geo.cs
		rc, err := c.dataCount(e.host)
		if err != nil {
			return err
		}
		c.checkCopied(at, "cluster", e.host, rc, e.copied)
	case e.kind == compressed:
		c.res.Allocated++
		c.res.Fragmented++
		c.res.Compressed++
	}
	return nil
}

// dataCount returns the refcount of the data cluster at host. Those in a data file
// have none, and count as used once.
func (c *checker) dataCount(host uint64) (uint64, error) {
	if c.geo.external {
		return 1, nil
	}
	return c.refcount(host >> c.geo.bits)
}

func (c *checker) checkCopied(at uint64, what string, off, rc uint64, copied bool) {
	if (rc == 1) != copied {
		c.copied++
		c.bad("copied", at, "%s at %#x: copied flag is %t, refcount is %d", what, off, copied, rc)
	}
}
