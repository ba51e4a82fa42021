package main

import (
	"bufio"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// areaColours are the colours of areas on a terminal of 256 colours, which can be
// told apart on light and on dark ground.
var areaColours = []int{33, 34, 172, 133, 37, 166, 69, 106, 168, 136, 31, 98}

// sgr writes text in a colour, unless colours are off.
func (m *hexMap) sgr(colours bool, p *hexPart, s string) string {
	if !colours {
		return s
	}
	codes := ""
	switch {
	case len(p.bad) > 0:
		codes = "1;97;41"
	case p.fill || p.area < 0:
		codes = "90"
	default:
		codes = fmt.Sprintf("38;5;%d", areaColours[p.area%len(areaColours)])
		if p.check {
			codes += ";7"
		} else if p.shade == 1 {
			codes += ";4"
		}
	}
	return "\x1b[" + codes + "m" + s + "\x1b[0m"
}

// minNames is the least room in which names are of use.
const minNames = 16

// terminal draws the image in lines of 16 bytes, with the fields that begin in
// each. Colours tell areas apart, underlining neighbours in an area; checksums
// are inverse, and what has a problem is on red.
func (m *hexMap) terminal(out io.Writer, width int, colours bool) error {
	w := bufio.NewWriter(out)
	digits := m.offsetDigits()
	all := width - digits - 2 - 3*hexWidth - 1 - hexWidth - 2
	lines, rest := m.lines()
	for _, l := range lines {
		if l.left > 0 {
			fmt.Fprintf(w, "%s  %s\n", strings.Repeat(" ", digits), m.sgr(colours, &hexPart{fill: true}, fmt.Sprintf("... %d bytes more of %02x", l.left, m.image[l.off])))
			continue
		}
		fmt.Fprintf(w, "%s  ", m.sgr(colours, &hexPart{fill: true}, fmt.Sprintf("%0*x", digits, l.off)))
		n := 0
		var chars, names strings.Builder
		used, area, room := 0, -1, all
		for _, piece := range l.pieces {
			p := &m.parts[piece.part]
			var hex, text strings.Builder
			for i, b := range piece.bytes {
				if i > 0 {
					hex.WriteByte(' ')
				}
				fmt.Fprintf(&hex, "%02x", b)
				text.WriteByte(ascii(b))
			}
			n += len(piece.bytes)
			w.WriteString(m.sgr(colours, p, hex.String()) + " ")
			chars.WriteString(m.sgr(colours, p, text.String()))
			if !piece.first || p.area < 0 || room < minNames {
				continue
			}
			name := printable(p.Name)
			if p.area == area { // said already
				name = strings.TrimPrefix(name, m.areas[area])
			}
			if area = p.area; used+utf8.RuneCountInString(name) >= room-2 {
				name, room = "…", 0
			}
			names.WriteString(" " + m.sgr(colours, &hexPart{area: p.area, bad: p.bad}, name))
			used += utf8.RuneCountInString(name) + 1
		}
		fmt.Fprintf(w, "%s %s%s %s\n", strings.Repeat("   ", hexWidth-n), chars.String(), strings.Repeat(" ", hexWidth-n), names.String())
	}
	if rest > 0 {
		fmt.Fprintf(w, "%s  ... %d bytes more; -o page.html or nvtool vpd unpack shows them\n", strings.Repeat(" ", digits), rest)
	}
	fmt.Fprintln(w)
	return w.Flush()
}
