// Package raw packs images of no particular format: a size, a fill byte, and
// patches.
//
//	{
//	  "format": "raw",
//	  "size": 128, "fill": "0xff",
//	  "patches": [
//	    {"name": "MAC address", "offset": 0, "type": "hex", "data": "52:54:00:12:34:56"},
//	    {"offset": "0x7e", "type": "u16le", "data": "0xbaba"},
//	    {"offset": 0, "type": "u8", "data": 0, "overwrite": true}
//	  ]
//	}
//
// The types are those of every spec: text, hex, base64, u8, u16le to u64be;
// "count" repeats, "size" and "fill" fill up. A patch that overlaps an earlier
// one is refused unless it says "overwrite". Nothing is read from files.
package raw

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"sort"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/spec"
)

// Name is the format's name in a spec.
const Name = "raw"

// MaxSize is the most bytes an image may have. It bounds the memory that a
// spec of a few bytes, or the text of an image, can take.
const MaxSize = 16 << 20

const maxPatches = 1 << 14

type format struct{}

// Format returns the format.
func Format() vpd.Format { return format{} }

func (format) Name() string { return Name }

// Detect is always false: anything could be raw.
func (format) Detect([]byte) bool { return false }

// Verify knows nothing that could be wrong, except the size.
func (format) Verify(image []byte) []vpd.Problem {
	if err := checkSize(image); err != nil {
		return []vpd.Problem{{Area: "image", Off: -1, Msg: err.Error()}}
	}
	return nil
}

// Fix returns a copy: there are no checksums that it knows.
func (format) Fix(image []byte) ([]byte, []vpd.Change, error) {
	if err := checkSize(image); err != nil {
		return nil, nil, err
	}
	return slices.Clone(image), nil, nil
}

func checkSize(image []byte) error {
	if len(image) == 0 || len(image) > MaxSize {
		return &vpd.ImageError{Format: Name, Msg: fmt.Sprintf("%d bytes, want 1 to %d", len(image), MaxSize)}
	}
	return nil
}

// Pack makes an image of a spec.
func (format) Pack(text []byte) ([]byte, []vpd.Warning, error) {
	o, err := spec.Parse(text, Name)
	if err != nil {
		return nil, nil, err
	}
	if err := o.Only("", "format", "size", "fill", "patches"); err != nil {
		return nil, nil, err
	}
	rawSize, ok := o.Get("size")
	if !ok {
		return nil, nil, spec.Errorf("size", "missing")
	}
	size, err := spec.Uint("size", rawSize, MaxSize)
	if err != nil {
		return nil, nil, err
	}
	if size == 0 {
		return nil, nil, spec.Errorf("size", "want 1 or more")
	}
	fill := uint64(0xff)
	if raw, ok := o.Get("fill"); ok {
		if fill, err = spec.Uint("fill", raw, 0xff); err != nil {
			return nil, nil, err
		}
	}
	image := bytes.Repeat([]byte{byte(fill)}, int(size))
	if raw, ok := o.Get("patches"); ok {
		if err := apply(image, raw); err != nil {
			return nil, nil, err
		}
	}
	return image, nil, nil
}

// A span is where a patch lies, and the number it has in the list.
type span struct{ off, end, n int }

func apply(image []byte, raw json.RawMessage) error {
	var list []json.RawMessage
	if err := json.Unmarshal(raw, &list); err != nil || string(raw) == "null" {
		return spec.Errorf("patches", "want a list")
	}
	if len(list) > maxPatches {
		return spec.Errorf("patches", "%d, want at most %d", len(list), maxPatches)
	}
	var done spans
	for i, p := range list {
		if err := patch(image, p, i, &done); err != nil {
			return err
		}
	}
	return nil
}

func patch(image []byte, raw json.RawMessage, i int, done *spans) error {
	path := fmt.Sprintf("patches[%d]", i)
	o, err := spec.ParseObject(path, raw)
	if err != nil {
		return err
	}
	rawOff, ok := o.Get("offset")
	if !ok {
		return spec.Errorf(path+".offset", "missing")
	}
	off, err := spec.Uint(path+".offset", rawOff, uint64(len(image)))
	if err != nil {
		return err
	}
	if name, ok := o.Get("name"); ok {
		if _, err := spec.String(path+".name", name); err != nil {
			return err
		}
	}
	over := false
	if rawOver, ok := o.Get("overwrite"); ok {
		if over, err = spec.Bool(path+".overwrite", rawOver); err != nil {
			return err
		}
	}
	v, err := spec.ParseValue(path, raw, len(image)-int(off), "name", "offset", "overwrite")
	if err != nil {
		return err
	}
	s := span{int(off), int(off) + len(v.Bytes), i}
	if s.end == s.off {
		return nil
	}
	if other, hit := done.find(s); hit && !over {
		return spec.Errorf(path, "bytes %#x to %#x overlap patches[%d]; say overwrite if that is meant", s.off, s.end-1, other.n)
	}
	copy(image[s.off:], v.Bytes)
	done.add(s)
	return nil
}

// spans is a set of disjoint spans in ascending order.
type spans []span

// find returns the first span that overlaps s.
func (set spans) find(s span) (span, bool) {
	i := sort.Search(len(set), func(i int) bool { return set[i].end > s.off })
	if i < len(set) && set[i].off < s.end {
		return set[i], true
	}
	return span{}, false
}

// add merges s into what it overlaps.
func (set *spans) add(s span) {
	from := sort.Search(len(*set), func(i int) bool { return (*set)[i].end > s.off })
	to := from
	for to < len(*set) && (*set)[to].off < s.end {
		s.off, s.end = min(s.off, (*set)[to].off), max(s.end, (*set)[to].end)
		to++
	}
	*set = slices.Replace(*set, from, to, s)
}

// minGap is the length of a run of fill that ends a patch. A shorter one costs
// less as part of the patch than a new patch does.
const minGap = 8

// runs finds what isn't fill. The fill is the commonest byte, and of several
// the highest, so that it is 0xff in an erased memory.
func runs(image []byte) (fill byte, list []span) {
	var count [256]int
	for _, b := range image {
		count[b]++
	}
	for b, n := range count {
		if n >= count[fill] {
			fill = byte(b)
		}
	}
	for off := 0; off < len(image); off++ {
		if image[off] == fill {
			continue
		}
		if n := len(list); n > 0 && off-list[n-1].end < minGap {
			list[n-1].end = off + 1
			continue
		}
		list = append(list, span{off: off, end: off + 1})
	}
	return fill, list
}

// Parse makes a spec of an image, with a patch for each run of bytes that
// aren't fill.
func (format) Parse(image []byte) ([]byte, []vpd.Warning, error) {
	if err := checkSize(image); err != nil {
		return nil, nil, err
	}
	fill, list := runs(image)
	if len(list) > maxPatches {
		list = []span{{off: 0, end: len(image)}}
	}
	patches := []spec.Object{}
	for _, s := range list {
		var p spec.Object
		p.Add("offset", fmt.Sprintf("%#x", s.off))
		if b := image[s.off:s.end]; len(b) >= 4 && spec.IsText(b) {
			p.Add("type", "text")
			p.Add("data", string(b))
		} else {
			p.Add("type", "hex")
			p.Add("data", hex.EncodeToString(b))
		}
		patches = append(patches, p)
	}
	var o spec.Object
	o.Add("format", Name)
	o.Add("size", len(image))
	o.Add("fill", spec.Byte(fill))
	o.Add("patches", patches)
	text, err := o.Text()
	if err != nil {
		return nil, nil, err
	}
	return text, nil, nil
}

// Fields lists the runs of bytes that aren't fill.
func (format) Fields(image []byte) ([]vpd.Field, error) {
	if err := checkSize(image); err != nil {
		return nil, err
	}
	_, list := runs(image)
	var fields []vpd.Field
	for _, s := range list {
		fields = append(fields, vpd.Field{Off: int64(s.off), Len: int64(s.end - s.off),
			Name: fmt.Sprintf("data@%#x", s.off), Value: spec.Brief(image[s.off:s.end])})
	}
	return fields, nil
}
