package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sort"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/blobdir"
	"nvstore.dev/nvstore"
)

func (a *app) mapCmd() *cobra.Command {
	var ref imageRef
	var key keyFlags
	var output string
	c := a.verb("map IMAGE [-o map.svg]", "Draw where each blob, node, root and free block lies", func(ctx context.Context, args []string) error {
		if _, err := ref.take(args, 0, 0, ""); err != nil {
			return err
		}
		return a.drawMap(ctx, &ref, &key, output)
	})
	c.Long = `Draw where each blob, node, root and free block lies in the image: on the
terminal, or as SVG in FILE, or every region as JSON. No key is needed.`
	ref.flags(c)
	ref.previousFlag(c)
	key.flags(c, "the ")
	c.Flags().StringVarP(&output, "output", "o", "", "draw an SVG `FILE`")
	return c
}

func (a *app) drawMap(ctx context.Context, ref *imageRef, key *keyFlags, output string) (err error) {
	s, err := a.open(ctx, ref, key, browsing)
	if err != nil {
		return err
	}
	defer closing(s, &err)
	var regions []blobdir.Region
	err = s.Dir().Regions(func(r blobdir.Region) error {
		regions = append(regions, r)
		return ctx.Err()
	})
	if err != nil {
		return a.explain(ref, err)
	}
	sort.SliceStable(regions, func(i, j int) bool { return regions[i].Offset < regions[j].Offset })
	info, err := s.Info()
	if err != nil {
		return err
	}
	m := &imageMap{title: ref.location, info: info, regions: regions, live: make(map[int64]string)}
	list, err := s.List("")
	if err != nil {
		return a.explain(ref, err)
	}
	for i := range list {
		if e := &list[i]; e.Live {
			m.live[e.Offset] = liveState(e)
		}
	}
	m.measure()
	switch {
	case output != "":
		if err := a.writeOutput(output, m.svg); err != nil {
			return err
		}
		if output != "-" {
			a.sayf("%s: a map of %s", printable(output), count(int64(len(regions)), "region"))
		}
		return nil
	case a.json:
		return a.printJSON(m.facts())
	}
	return m.text(a.out, a.width(), a.colours())
}

// An imageMap is what there is to draw.
type imageMap struct {
	title   string
	info    *nvstore.Info
	regions []blobdir.Region // in order of offset
	end     int64            // the first byte that was never used
	blobs   []blobShare      // in order of the alphabet
	index   map[string]int
	live    map[int64]string // offset of each live extent, and its state
}

// A blobShare is a blob and the bytes it takes.
type blobShare struct {
	name  string
	bytes int64
	state string // of a live extent
}

func (m *imageMap) measure() {
	bytes, states := make(map[string]int64), make(map[string]string)
	for _, r := range m.regions {
		m.end = max(m.end, r.Offset+blocks(r.Length))
		if r.Blob != "" {
			bytes[r.Blob] += blocks(r.Length)
		}
		if r.Kind == blobdir.RegionLive {
			states[r.Blob] = ", live, " + m.live[r.Offset]
		}
	}
	for name, n := range bytes {
		m.blobs = append(m.blobs, blobShare{name, n, states[name]})
	}
	slices.SortFunc(m.blobs, func(a, b blobShare) int { return strings.Compare(a.name, b.name) })
	m.index = make(map[string]int, len(m.blobs))
	for i, b := range m.blobs {
		m.index[b.name] = i
	}
}

// blocks rounds up to whole blocks.
func blocks(n int64) int64 { return ceilDiv(n, block) * block }

// A class is what the map tells apart.
type class int

// In order of what matters most where a cell has several.
const (
	classUnused class = iota // never used
	classFree
	classResting // given up, and not yet reusable
	classBlob
	classNode
	classKeys
	classFixed
	classRoot
	classes
)

var classText = [classes]struct{ glyph, name, fill string }{
	classUnused:  {" ", "never used", "#ffffff"},
	classFree:    {"·", "free", "#e8e8e8"},
	classResting: {"░", "free, once used", "#cfcfcf"},
	classBlob:    {"", "content of a blob", ""},
	classNode:    {"▒", "nodes: directory, chunk maps, free space", "#8d6e63"},
	classKeys:    {"▓", "key slots", "#6a1b9a"},
	classFixed:   {"■", "header and settled record", "#37474f"},
	classRoot:    {"█", "roots", "#c62828"},
}

func classOf(r *blobdir.Region) class {
	switch r.Kind {
	case blobdir.RegionRoot:
		return classRoot
	case blobdir.RegionHeader, blobdir.RegionSettled:
		return classFixed
	case blobdir.RegionKeySlots:
		return classKeys
	case blobdir.RegionChunk, blobdir.RegionLive:
		return classBlob
	case blobdir.RegionFree:
		if r.Generation > 0 {
			return classResting
		}
		return classFree
	}
	return classNode
}

// A cell is a run of bytes of the image, and what is most of it. Roots and
// nodes count before content, and content before free space, as they would
// drown otherwise.
type cell struct {
	class  class
	blob   int   // index of the blob that has most of it
	most   int64 // its bytes in one piece
	region int   // the first region that made it what it is
}

// cells cuts [0, end) into cells of step bytes.
func (m *imageMap) cells(step int64) []cell {
	out := make([]cell, ceilDiv(m.end, step))
	for i := range m.regions {
		r := &m.regions[i]
		c := classOf(r)
		for at := r.Offset; at < r.Offset+r.Length; {
			k := at / step
			next := min((k+1)*step, r.Offset+r.Length)
			q := &out[k]
			switch {
			case c > q.class:
				*q = cell{c, m.index[r.Blob], next - at, i}
			case c == q.class && next-at > q.most:
				q.blob, q.most, q.region = m.index[r.Blob], next-at, i
			}
			at = next
		}
	}
	return out
}

// stepFor is how many bytes a cell has so that there are at most n: whole
// blocks, a power of two of them.
func (m *imageMap) stepFor(n int64) int64 {
	step := int64(block)
	for ceilDiv(m.end, step) > n {
		step *= 2
	}
	return step
}

type mapFacts struct {
	Size       int64       `json:"virtual_size"`
	End        int64       `json:"end"` // what lies behind was never used
	Block      int64       `json:"block_size"`
	Generation int64       `json:"generation"`
	Regions    []mapRegion `json:"regions"`
}

type mapRegion struct {
	Offset     int64  `json:"offset"`
	Length     int64  `json:"length"`
	Kind       string `json:"kind"`
	Blob       string `json:"blob,omitempty"`
	State      string `json:"state,omitempty"` // of a live extent
	Generation int64  `json:"generation"`
}

func (m *imageMap) facts() *mapFacts {
	f := &mapFacts{m.info.Size, m.end, block, m.info.Generation, make([]mapRegion, len(m.regions))}
	for i, r := range m.regions {
		f.Regions[i] = mapRegion{r.Offset, r.Length, string(r.Kind), r.Blob, m.live[r.Offset], r.Generation}
	}
	return f
}

// letters mark blobs where there is no colour to do it.
const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

// letter is a blob's mark; far down the list they repeat.
func letter(i int) string { return letters[i%len(letters) : i%len(letters)+1] }

// palette are colours of the xterm palette for blobs, dark enough for white
// letters, and what they are in SVG.
var palette = []struct {
	code int
	hex  string
}{{25, "#005faf"}, {28, "#008700"}, {130, "#af5f00"}, {90, "#870087"}, {30, "#008787"}, {94, "#875f00"}, {61, "#5f5faf"}, {125, "#af005f"}, {64, "#5f8700"}, {66, "#5f8787"}}

// text draws the map in rows of cells, with offsets at the left.
func (m *imageMap) text(w io.Writer, width int, colours bool) error {
	const margin, maxRows = 14, 24
	cols := int64(max(width-margin, 16))
	cols = min(cols-cols%8, 128)
	step := m.stepFor(cols * maxRows)
	cells := m.cells(step)
	fmt.Fprintf(w, "%s: generation %d, %s; each mark is %s of %s in use, of %s\n\n", printable(m.title),
		m.info.Generation, count(m.info.Blobs, "blob"), roughSize(step), roughSize(m.end), roughSize(m.info.Size))
	for at := int64(0); at < int64(len(cells)); at += cols {
		fmt.Fprintf(w, "%#12x  ", at*step)
		for i := at; i < min(at+cols, int64(len(cells))); i++ {
			io.WriteString(w, glyph(cells[i], colours))
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintln(w)
	return m.legend(w, cells, colours)
}

func glyph(c cell, colours bool) string {
	if c.class == classBlob {
		if colours {
			return fmt.Sprintf("\x1b[1;97;48;5;%dm%s\x1b[0m", palette[c.blob%len(palette)].code, letter(c.blob))
		}
		return letter(c.blob)
	}
	g := classText[c.class].glyph
	if colours {
		if code := map[class]int{classRoot: 160, classFixed: 67, classKeys: 133, classNode: 137, classFree: 244, classResting: 244}[c.class]; code != 0 {
			return fmt.Sprintf("\x1b[38;5;%dm%s\x1b[0m", code, g)
		}
	}
	return g
}

// maxLegend bounds the legend of a store of many blobs.
const maxLegend = 40

func (m *imageMap) legend(w io.Writer, cells []cell, colours bool) error {
	for c := classes - 1; c >= classFree; c-- {
		if c == classBlob || !slices.ContainsFunc(cells, func(x cell) bool { return x.class == c }) {
			continue
		}
		fmt.Fprintf(w, "  %s  %s\n", glyph(cell{class: c}, colours), classText[c].name)
	}
	for i, b := range m.blobs {
		if i == maxLegend {
			fmt.Fprintf(w, "     and %d more\n", len(m.blobs)-i)
			break
		}
		fmt.Fprintf(w, "  %s  %s (%s%s)\n", glyph(cell{class: classBlob, blob: i}, colours), printable(b.name), roughSize(b.bytes), b.state)
	}
	_, err := fmt.Fprintln(w)
	return err
}
