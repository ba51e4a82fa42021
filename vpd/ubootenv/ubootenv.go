// Package ubootenv packs and parses U-Boot's environment, as U-Boot, mkenvimage
// and fw_setenv write it (doc/usage/environment.rst and env/common.c of
// U-Boot).
//
//	+--------+-----------------+---------------------------+------+
//	| CRC 32 | flag 8, if two  | name=value \0 ... \0 \0   | fill |
//	+--------+-----------------+---------------------------+------+
//
// The CRC is CRC-32 (IEEE, as in zlib), little-endian, of all behind the flag.
// Where it ends the image doesn't say: a reader has to know the size of the
// environment. This one tries every size, until the CRC fits.
//
// A redundant environment is two copies with a flag in each, of which U-Boot
// takes one whose CRC is right: the one with the greater flag, where 0 comes
// after 255 (on NOR flash the flag is 1 for the active copy, and 0 for the
// other). A copy whose CRC is wrong beside a good one is what an interrupted
// saveenv leaves behind. It is reported, and never fixed: that would make it
// count.
//
// The spec:
//
//	{
//	  "format": "ubootenv",
//	  "env_size": "0x2000",          // of one copy, with its CRC and flag
//	  "variables": {"bootdelay": "3", "bootcmd": "run distro_bootcmd"},
//	  "pad": "0xff",                 // behind the variables
//
//	  // For a redundant environment:
//	  "redundant": true,
//	  "copies": [{"flag": 1}, {"flag": 0, "offset": "0x10000"}],  // one with flag 1, if it is missing
//
//	  "size": "0x20000", "fill": "0xff",   // of the image, around the copies
//	  "patches": [...]                     // other bytes around them
//	}
//
// A copy may have "variables" and "pad" of its own, and "crc" if that is wrong.
// What "variables" can't say is spelt out: "entries", a list of strings or bytes,
// where one has no "=" or names come twice; "rest" for bytes between the
// variables' end and the pad; and "data" for all behind the flag, where the
// variables have no end.
package ubootenv

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"regexp"
	"slices"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/spec"
)

// Name is the format's name in a spec.
const Name = "ubootenv"

// MaxSize is the most bytes an image may have: two copies of half of it, which
// is more than boards have.
const MaxSize = 1 << 20

const (
	crcSize = 4
	minData = 3 // bytes of the least environment, behind its header
)

type format struct{}

// Format returns the format.
func Format() vpd.Format { return format{} }

func (format) Name() string { return Name }

// An env is one copy.
type env struct {
	off, size int
	flagged   bool
	block     []byte // all of it
	good      bool   // its CRC is right
}

func (e *env) header() int {
	if e.flagged {
		return crcSize + 1
	}
	return crcSize
}

func (e *env) data() []byte    { return e.block[e.header():] }
func (e *env) crc() uint32     { return binary.LittleEndian.Uint32(e.block) }
func (e *env) want() uint32    { return crc32.ChecksumIEEE(e.data()) }
func (e *env) flag() byte      { return e.block[crcSize] }
func hex32(n uint32) string    { return fmt.Sprintf("0x%08x", n) }
func copyName(i int) string    { return fmt.Sprintf("copies[%d]", i) }
func blank(b []byte) bool      { return len(b) == 0 || uniform(b) && (b[0] == 0 || b[0] == 0xff) }
func uniform(b []byte) bool    { return !slices.ContainsFunc(b, func(c byte) bool { return c != b[0] }) }
func (e *env) end() int        { return e.off + e.size }
func (e *env) entriesOff() int { return e.off + e.header() }

// A layout is where the copies lie in an image.
type layout struct {
	image []byte
	envs  []env // one or two, in ascending order of offset
}

// fixable tells whether a wrong CRC can be put right without harm: of an
// environment that is alone.
func (l *layout) fixable() bool { return len(l.envs) == 1 }

func (l *layout) area(i int) string {
	if l.envs[i].flagged {
		return copyName(i)
	}
	return ""
}

// name is a member of copy i.
func (l *layout) name(i int, member string) string { return spec.Join(l.area(i), member) }

// scan finds the copies.
func scan(image []byte) (*layout, error) {
	fail := func(format string, args ...any) (*layout, error) {
		return nil, &vpd.ImageError{Format: Name, Msg: fmt.Sprintf(format, args...)}
	}
	if len(image) > MaxSize {
		return fail("%d bytes, want at most %d", len(image), MaxSize)
	}
	l := &layout{image: image}
	for _, find := range []func() []env{l.fromStart, l.second, l.broken} {
		if l.envs = find(); l.envs != nil {
			return l, nil
		}
	}
	return fail("no environment: no CRC-32 in front fits, for any size, and there is nothing like name=value behind it")
}

// at makes a copy.
func (l *layout) at(off, size int, flagged bool) env {
	e := env{off: off, size: size, flagged: flagged, block: l.image[off : off+size]}
	e.good = e.crc() == e.want()
	return e
}

// fit finds the size of an environment at off for which the CRC is right. All
// sizes take one pass.
func (l *layout) fit(off int, flagged bool) (e env, ok bool) {
	e = env{off: off, flagged: flagged, good: true}
	b := l.image[off:]
	if len(b) < e.header()+minData || blank(b[:crcSize]) {
		return e, false
	}
	want := binary.LittleEndian.Uint32(b)
	crc := ^uint32(0)
	for i := e.header(); i < len(b); i++ {
		crc = crc>>8 ^ crc32.IEEETable[byte(crc)^b[i]]
		if ^crc == want && i+1 >= e.header()+minData {
			e.size = i + 1
			e.block = b[:e.size]
			return e, true
		}
	}
	return e, false
}

const (
	// step is what the second copy's offset is a multiple of, if it isn't
	// right behind the first: the least erase sector.
	step = 4096

	// maxTries bounds how often all sizes are tried.
	maxTries = 64
)

// fromStart: a good copy in front, and perhaps another one, good or not.
func (l *layout) fromStart() []env {
	if e, ok := l.fit(0, false); ok {
		return []env{e}
	}
	first, ok := l.fit(0, true)
	if !ok {
		return nil
	}
	for off := first.size; off <= len(l.image)-first.size; off += step - off%step {
		if !l.starts(off, true) && !l.empty(off) {
			continue
		}
		if e := l.at(off, first.size, true); e.good {
			return []env{first, e}
		}
	}
	if n := first.size; len(l.image) >= 2*n && !blank(l.image[n:2*n]) && (len(l.image) == 2*n || l.starts(n, true)) {
		return []env{first, l.at(n, n, true)}
	}
	return []env{first}
}

// second: the first copy is bad, or was never written.
func (l *layout) second() []env {
	tries := 0
	for _, off := range append([]int{len(l.image) / 2}, l.sectors()...) {
		if tries == maxTries || !l.starts(off, true) && !l.empty(off) {
			continue
		}
		tries++
		e, ok := l.fit(off, true)
		switch {
		case !ok:
		case e.size <= off && !blank(l.image[:e.size]):
			return []env{l.at(0, e.size, true), e}
		default:
			return []env{e}
		}
	}
	return nil
}

func (l *layout) sectors() (offs []int) {
	for off := step; off < len(l.image); off += step {
		offs = append(offs, off)
	}
	return offs
}

// broken: no CRC is right. The size is the image's, or half of it.
func (l *layout) broken() []env {
	n := len(l.image)
	if half := n / 2; n%2 == 0 && l.starts(0, true) && l.starts(half, true) {
		return []env{l.at(0, half, true), l.at(half, half, true)}
	}
	for _, flagged := range []bool{false, true} {
		if l.starts(0, flagged) {
			return []env{l.at(0, n, flagged)}
		}
	}
	return nil
}

var assignment = regexp.MustCompile(`^[A-Za-z0-9_.#-]+=`)

// starts tells whether there could be an environment: name=value behind CRC
// and flag. A flag isn't a letter.
func (l *layout) starts(off int, flagged bool) bool {
	b := l.image[off:]
	header := (&env{flagged: flagged}).header()
	return len(b) >= header+minData && assignment.Match(b[header:min(len(b), header+64)])
}

// empty tells whether there could be a redundant environment without variables.
func (l *layout) empty(off int) bool {
	b := l.image[off:]
	return len(b) >= crcSize+1+minData && b[crcSize+1] == 0 && !blank(b[:crcSize])
}

// Detect wants a right CRC over variables; or else several variables, an end,
// and the size of a sector.
func (format) Detect(image []byte) bool {
	l, err := scan(image)
	if err != nil {
		return false
	}
	for _, e := range l.envs {
		c := e.content()
		_, _, ok := c.variables()
		if c.ended && ok && (e.good && len(c.entries) > 0 || len(c.entries) >= 3 && len(image)%512 == 0) {
			return true
		}
	}
	return false
}

// content is a copy's data cut into its parts.
type content struct {
	entries [][]byte
	ended   bool   // by an empty entry; else there is only rest
	rest    []byte // behind the end
	pad     []byte // bytes that are all the same
}

func (e *env) content() (c content) {
	left := e.data()
	for {
		entry, after, ok := bytes.Cut(left, []byte{0})
		if !ok {
			return content{rest: e.data()}
		}
		left = after
		if len(entry) == 0 {
			break
		}
		c.entries = append(c.entries, entry)
	}
	c.ended = true
	n := len(left)
	for n > 0 && left[n-1] == left[len(left)-1] {
		n--
	}
	c.rest, c.pad = left[:n], left[n:]
	return c
}

// variables are the entries as names and values, if that is what they are and
// no name comes twice.
func (c *content) variables() (names []string, values [][]byte, ok bool) {
	seen := map[string]bool{}
	for _, b := range c.entries {
		name, value, ok := bytes.Cut(b, []byte("="))
		if !ok || len(name) == 0 || seen[string(name)] || !isText(name) {
			return nil, nil, false
		}
		seen[string(name)] = true
		names, values = append(names, string(name)), append(values, value)
	}
	return names, values, true
}
