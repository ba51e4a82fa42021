package main

import (
	"bufio"
	"fmt"
	"html"
	"io"
)

// Measures of the drawing, in pixels.
const (
	svgCols   = 128
	svgRows   = 128
	svgCell   = 9
	svgMargin = 90
	svgTop    = 56
	svgLine   = 18
)

// svg draws the map as one self-contained file: no script, no font, no link.
func (m *imageMap) svg(out io.Writer) error {
	w := bufio.NewWriter(out)
	step := m.stepFor(svgCols * svgRows)
	cells := m.cells(step)
	rows := (len(cells) + svgCols - 1) / svgCols
	legend := min(len(m.blobs), maxLegend) + int(classes)
	width := svgMargin + svgCols*svgCell + 20
	height := svgTop + rows*svgCell + 30 + ((legend+2)/3+1)*svgLine
	fmt.Fprintf(w, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n", width, height, width, height)
	fmt.Fprintf(w, `<rect width="%d" height="%d" fill="#fff"/>`+"\n", width, height)
	fmt.Fprintf(w, `<text x="10" y="22" font-size="15">%s</text>`+"\n", html.EscapeString(printable(m.title)))
	fmt.Fprintf(w, `<text x="10" y="42">generation %d, %s; each square is %s of %s in use, of %s</text>`+"\n",
		m.info.Generation, count(m.info.Blobs, "blob"), roughSize(step), roughSize(m.end), roughSize(m.info.Size))
	for row := range rows {
		if row%8 == 0 {
			fmt.Fprintf(w, `<text x="%d" y="%d" text-anchor="end" font-family="monospace" font-size="10">%#x</text>`+"\n",
				svgMargin-6, svgTop+row*svgCell+svgCell, int64(row*svgCols)*step)
		}
		m.svgRow(w, cells, row, step)
	}
	m.svgLegend(w, svgTop+rows*svgCell+30)
	fmt.Fprintln(w, "</svg>")
	return w.Flush()
}

// svgRow draws runs of equal cells as one rectangle.
func (m *imageMap) svgRow(w io.Writer, cells []cell, row int, step int64) {
	end := min((row+1)*svgCols, len(cells))
	for i := row * svgCols; i < end; {
		c, n := cells[i], 1
		for i+n < end && cells[i+n].class == c.class && cells[i+n].blob == c.blob && cells[i+n].region == c.region {
			n++
		}
		if c.class != classUnused {
			fmt.Fprintf(w, `<rect x="%d" y="%d" width="%d" height="%d" fill="%s" stroke="#fff" stroke-width="0.5"><title>%s</title></rect>`+"\n",
				svgMargin+i%svgCols*svgCell, svgTop+row*svgCell, n*svgCell, svgCell, m.fill(c), html.EscapeString(m.tip(c)))
		}
		i += n
	}
}

func (m *imageMap) fill(c cell) string {
	if c.class == classBlob {
		return palette[c.blob%len(palette)].hex
	}
	return classText[c.class].fill
}

// tip says on hover what a cell's first region is.
func (m *imageMap) tip(c cell) string {
	r := &m.regions[c.region]
	s := fmt.Sprintf("%s at %#x, %d bytes", r.Kind, r.Offset, r.Length)
	if r.Blob != "" {
		s = printable(r.Blob) + ": " + s
	}
	switch {
	case classOf(r) == classResting:
		s += fmt.Sprintf(", given up by generation %d", r.Generation)
	case r.Generation > 0:
		s += fmt.Sprintf(", generation %d", r.Generation)
	}
	return s
}

func (m *imageMap) svgLegend(w io.Writer, top int) {
	n := 0
	entry := func(fill, text string) {
		x, y := 10+n%3*400, top+n/3*svgLine
		fmt.Fprintf(w, `<rect x="%d" y="%d" width="12" height="12" fill="%s" stroke="#888" stroke-width="0.5"/><text x="%d" y="%d">%s</text>`+"\n",
			x, y, fill, x+18, y+11, html.EscapeString(text))
		n++
	}
	for c := classes - 1; c >= classUnused; c-- {
		if c != classBlob {
			entry(classText[c].fill, classText[c].name)
		}
	}
	for i, b := range m.blobs {
		if i == maxLegend {
			entry("#fff", fmt.Sprintf("and %d more", len(m.blobs)-i))
			return
		}
		entry(palette[i%len(palette)].hex, fmt.Sprintf("%s (%s)", printable(b.name), roughSize(b.bytes)))
	}
}
