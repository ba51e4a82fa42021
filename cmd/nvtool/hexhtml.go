package main

import (
	_ "embed"
	"encoding/hex"
	"fmt"
	"html"
	"html/template"
	"io"
	"strings"
)

//go:embed hexmap.html
var hexPage string

var hexTemplate = template.Must(template.New("hexmap").Parse(hexPage))

// The page's data.
type (
	pageMap struct {
		ID       int
		What     string
		Format   string
		Size     string
		Bytes    int
		Good     bool
		Verdict  string
		Problems []pageProblem
		Areas    []pageArea
		Fields   []pageField
		Rows     template.HTML
		Rest     int
	}
	pageProblem struct {
		Text string
		Part int // where it is; -1 if nowhere
	}
	pageArea struct {
		Name string
		Hue  int
		Key  bool // it is more than fill
	}
	pageField struct {
		N      int
		Off    string
		Len    int64
		Name   string
		Value  string
		Hex    string
		Area   int
		Cover  int
		Covers int
		Check  bool
		Bad    string
		Class  string
	}
)

// hue spreads the areas around the circle of colours; the golden angle keeps
// any few of them apart. Red is left to what is wrong.
func hue(i int) int { return (205 + i*137) % 320 }

func (p *hexPart) class() string {
	c := fmt.Sprintf("a%d", p.area)
	switch {
	case p.fill || p.area < 0:
		c = "fill"
	case p.check:
		c += " k"
	case p.shade == 1:
		c += " s"
	}
	if len(p.bad) > 0 {
		c += " bad"
	}
	return c
}

func (m *hexMap) page(id int) pageMap {
	lines, rest := m.lines()
	out := pageMap{ID: id, What: printable(m.what), Format: m.format, Size: roughSize(int64(len(m.image))), Bytes: len(m.image),
		Good: len(m.problems) == 0, Verdict: m.verdict(), Rest: rest, Rows: template.HTML(m.rows(lines))}
	shown := map[int]bool{}
	for _, p := range m.parts {
		shown[p.area] = shown[p.area] || !p.fill
	}
	for i, a := range m.areas {
		out.Areas = append(out.Areas, pageArea{printable(a), hue(i), shown[i]})
	}
	covers := map[int]int{}
	for _, p := range m.parts {
		covers[p.cover]++
	}
	for i := range m.parts {
		p := &m.parts[i]
		b := m.bytes(p)
		shown := hex.EncodeToString(b[:min(len(b), 24)])
		if len(b) > 24 {
			shown += "…"
		}
		value := printable(p.Value)
		if p.fill {
			value = fmt.Sprintf("0x%02x, %d times", b[0], len(b))
		}
		out.Fields = append(out.Fields, pageField{N: i, Off: fmt.Sprintf("0x%0*x", m.offsetDigits(), p.Off), Len: p.Len, Name: printable(p.Name),
			Value: value, Hex: shown, Area: p.area, Cover: p.cover, Covers: covers[i], Check: p.check, Bad: strings.Join(p.bad, "; "), Class: p.class()})
	}
	for _, q := range m.problems {
		pp := pageProblem{printable(q.String()), -1}
		for i := range m.parts {
			if p := &m.parts[i]; q.Off >= p.Off && q.Off < p.Off+p.Len {
				pp.Part = i
			}
		}
		out.Problems = append(out.Problems, pp)
	}
	return out
}

// rows writes the bytes. Nothing of the image gets into it but hexadecimal
// digits and escaped printable characters.
func (m *hexMap) rows(lines []hexLine) string {
	var b strings.Builder
	for _, l := range lines {
		if l.left > 0 {
			fmt.Fprintf(&b, "<div class=gap>%d more bytes of %02x</div>\n", l.left, m.image[l.off])
			continue
		}
		fmt.Fprintf(&b, "<div class=row><b>%0*x</b><span class=hex>", m.offsetDigits(), l.off)
		var text strings.Builder
		n := 0
		for _, piece := range l.pieces {
			p := &m.parts[piece.part]
			for i, c := range piece.bytes {
				edge := ""
				if i == 0 && piece.first {
					edge = " l"
				}
				if i == len(piece.bytes)-1 && m.last(piece, l.off+n+i) {
					edge += " r"
				}
				fmt.Fprintf(&b, `<i class="%s%s" data-f=%d>%02x</i>`, p.class(), edge, piece.part, c)
				fmt.Fprintf(&text, `<i class="%s" data-f=%d>%s</i>`, p.class(), piece.part, html.EscapeString(string(rune(ascii(c)))))
			}
			n += len(piece.bytes)
		}
		b.WriteString(strings.Repeat("<u></u>", hexWidth-n))
		fmt.Fprintf(&b, "</span><span class=txt>%s</span></div>\n", text.String())
	}
	return b.String()
}

// last tells whether the byte at off is the part's last.
func (m *hexMap) last(piece hexPiece, off int) bool {
	p := &m.parts[piece.part]
	return int64(off)+1 == p.Off+p.Len
}

// writePage writes one self-contained file: no font, no link, and a script of
// its own only.
func writePage(w io.Writer, title string, maps []*hexMap) error {
	var list []pageMap
	for i, m := range maps {
		list = append(list, m.page(i))
	}
	return hexTemplate.Execute(w, struct {
		Title   string
		Version string
		Maps    []pageMap
	}{printable(title), version(), list})
}
