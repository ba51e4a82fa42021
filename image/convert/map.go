package convert

import (
	"context"

	"nvstore.dev/image"
)

// A Layer is one image of a backing chain.
type Layer struct {
	Name string // of its file, or ""

	// Size in bytes, if known: what a layer above has beyond it reads as
	// zeros and is nobody's.
	Size int64

	// Flat: it has no metadata that says what is stored, as a raw image.
	// All of it is present then, holes too, at its own place.
	Flat bool
}

// A Run is a run of bytes that are stored in the same way, with qemu-img map's
// JSON keys.
type Run struct {
	Start      int64  `json:"start"`
	Length     int64  `json:"length"`
	Depth      int    `json:"depth"`   // 0 is the image itself
	Present    bool   `json:"present"` // stored in some layer
	Zero       bool   `json:"zero"`    // reads as zeros
	Data       bool   `json:"data"`    // stored as bytes
	Compressed bool   `json:"compressed"`
	Offset     *int64 `json:"offset,omitempty"` // in the layer's file
	Filename   string `json:"filename,omitempty"`
}

func newRun(e image.Extent, layers []Layer) Run {
	r := Run{Start: e.Start, Length: e.Length, Depth: e.Depth, Present: e.Allocated, Zero: e.Zero,
		Data: !e.Zero, Compressed: e.Compressed}
	if e.Offset >= 0 {
		off := e.Offset
		r.Offset = &off
	}
	if d := e.Depth; d > 0 && d < len(layers) && layers[d].Size > 0 && e.Start >= layers[d].Size {
		r.Depth, r.Present, r.Offset = d-1, false, nil
		return r
	}
	if e.Depth < len(layers) {
		l := layers[e.Depth]
		if l.Flat {
			off := e.Start
			r.Present, r.Offset = true, &off
		}
		if r.Present {
			r.Filename = l.Name
		}
	}
	return r
}

// follows tells whether s goes on where r ends.
func (r *Run) follows(s *Run) bool {
	if r.Depth != s.Depth || r.Present != s.Present || r.Zero != s.Zero || r.Data != s.Data || r.Compressed != s.Compressed {
		return false
	}
	if r.Offset == nil || s.Offset == nil {
		return r.Offset == s.Offset
	}
	return *r.Offset+r.Length == *s.Offset
}

// Map calls yield with the runs of [off, off+n) of d, in order and as long as
// they get. layers describes d and what lies below it, from the top. An error
// of yield ends it.
func Map(ctx context.Context, d image.Device, layers []Layer, off, n int64, yield func(Run) error) error {
	if err := image.CheckRange(off, n, d.Size()); err != nil {
		return err
	}
	blocks := newProber(d)
	var last *Run
	for end := off + n; off < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		e, err := blocks.status(off, end-off)
		if err != nil {
			return err
		}
		r := newRun(e, layers)
		if last != nil && last.follows(&r) {
			last.Length += r.Length
		} else {
			if last != nil {
				if err := yield(*last); err != nil {
					return err
				}
			}
			last = &r
		}
		off = e.Start + e.Length
	}
	if last == nil {
		return nil
	}
	return yield(*last)
}
