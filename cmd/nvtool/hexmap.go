package main

import (
	"fmt"
	"strings"

	"nvstore.dev/vpd"
)

// A hexMap is an image cut into parts that have names, for drawing.
type hexMap struct {
	what     string
	format   string
	image    []byte
	problems []vpd.Problem
	parts    []hexPart
	areas    []string // what the first parts of the names are, in their order
}

// A hexPart is a field, or what lies between fields.
type hexPart struct {
	vpd.Field
	area  int  // which of the areas; -1 for what is between fields
	shade int  // 0 or 1, so that neighbours differ
	check bool // it is the checksum over others
	cover int  // the part that is the checksum over this one, or -1
	fill  bool // nothing but one byte, many times
	bad   []string
}

// minRun is how many equal bytes are nothing to look at.
const minRun = 32

func newHexMap(what string, f vpd.Format, image []byte) (*hexMap, error) {
	fields, err := f.Fields(image)
	if err != nil {
		return nil, err
	}
	m := &hexMap{what: what, format: f.Name(), image: image, problems: f.Verify(image)}
	areas := map[string]int{}
	end := int64(0)
	for _, x := range fields {
		// Formats list fields in order; what isn't is left out, so that
		// each byte is drawn once.
		if x.Off < end || x.Len <= 0 || x.Off+x.Len > int64(len(image)) {
			continue
		}
		m.gap(end, x.Off)
		name := areaOf(x.Name)
		area, ok := areas[name]
		if !ok {
			area = len(m.areas)
			areas[name] = area
			m.areas = append(m.areas, name)
		}
		m.add(x, area)
		end = x.Off + x.Len
	}
	m.gap(end, int64(len(image)))
	m.cover()
	m.blame()
	return m, nil
}

// areaOf is the first part of a field's name.
func areaOf(name string) string {
	if i := strings.IndexByte(name, '.'); i > 0 {
		return name[:i]
	}
	return name
}

func (m *hexMap) add(x vpd.Field, area int) {
	p := hexPart{Field: x, area: area, cover: -1}
	if n := len(m.parts); n > 0 && m.parts[n-1].area == area {
		p.shade = 1 - m.parts[n-1].shade
	}
	b := m.bytes(&p)
	p.fill = len(b) >= minRun && strings.Count(string(b), string(b[:1])) == len(b)
	m.parts = append(m.parts, p)
}

func (m *hexMap) gap(from, to int64) {
	if from < to {
		m.add(vpd.Field{Off: from, Len: to - from, Name: "(no field)"}, -1)
	}
}

func (m *hexMap) bytes(p *hexPart) []byte { return m.image[p.Off : p.Off+p.Len] }

// cover finds each part's checksum.
func (m *hexMap) cover() {
	byName := map[string]int{}
	for i, p := range m.parts {
		if _, ok := byName[p.Name]; !ok && p.area >= 0 {
			byName[p.Name] = i
		}
	}
	for i := range m.parts {
		if c, ok := byName[m.parts[i].CoveredBy]; ok && m.parts[i].CoveredBy != "" {
			m.parts[i].cover = c
			m.parts[c].check = true
		}
	}
}

// blame puts each problem to the part where it is.
func (m *hexMap) blame() {
	for _, q := range m.problems {
		for i := range m.parts {
			if p := &m.parts[i]; q.Off >= p.Off && q.Off < p.Off+p.Len {
				p.bad = append(p.bad, q.String())
			}
		}
	}
}

// verdict says in a word how good the image is.
func (m *hexMap) verdict() string {
	if len(m.problems) == 0 {
		return "good"
	}
	return count(int64(len(m.problems)), "problem")
}

// A hexLine is up to 16 bytes, or a number of lines that are left out because
// they have nothing but fill.
type hexLine struct {
	off    int
	left   int // bytes left out
	pieces []hexPiece
}

// A hexPiece is the bytes of a part on a line.
type hexPiece struct {
	part  int
	bytes []byte
	first bool // the part begins here
}

const hexWidth = 16

// maxLines bounds the drawing of an image; what is behind is said to be there.
const maxLines = 4096

// lines cuts the image. Of more than two whole lines of fill the middle ones
// are left out.
func (m *hexMap) lines() (list []hexLine, rest int) {
	part := 0
	for off := 0; off < len(m.image); {
		for m.parts[part].Off+m.parts[part].Len <= int64(off) {
			part++
		}
		p := &m.parts[part]
		whole := (int(p.Off+p.Len) - off) / hexWidth // lines that are all this part's
		if p.fill && whole > 3 && int64(off) > p.Off {
			skip := (whole - 1) * hexWidth
			list = append(list, hexLine{off: off, left: skip})
			off += skip
			continue
		}
		if len(list) >= maxLines {
			return list, len(m.image) - off
		}
		l := hexLine{off: off}
		end := min(off+hexWidth, len(m.image))
		for i, at := part, off; at < end; i++ {
			q := &m.parts[i]
			to := min(end, int(q.Off+q.Len))
			l.pieces = append(l.pieces, hexPiece{i, m.image[at:to], int64(at) == q.Off})
			at = to
		}
		list = append(list, l)
		off = end
	}
	return list, 0
}

// ascii is a byte in the right column.
func ascii(b byte) byte {
	if b < 0x20 || b > 0x7e {
		return '.'
	}
	return b
}

// offsetDigits is how many hexadecimal digits offsets have.
func (m *hexMap) offsetDigits() int { return max(4, len(fmt.Sprintf("%x", len(m.image)))) }
