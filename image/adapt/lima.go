package adapt

import (
	lima "github.com/lima-vm/go-qcow2reader/image"

	"nvstore.dev/image"
)

// Lima shows d as an image of go-qcow2reader, so that what is built on that
// (lima, its convert package) reads all that our drivers do. typ is what the
// image says it is, as "qcow2". Closing it closes d.
func Lima(d image.Device, typ string) lima.Image { return limaImage{d, lima.Type(typ)} }

type limaImage struct {
	image.Device
	typ lima.Type
}

func (i limaImage) Type() lima.Type { return i.typ }
func (i limaImage) Readable() error { return nil }

func (i limaImage) Extent(start, length int64) (lima.Extent, error) {
	if err := image.CheckRange(start, length, i.Size()); err != nil || length == 0 {
		return lima.Extent{}, image.ErrOutOfRange
	}
	s, ok := image.As[image.BlockStatuser](i.Device)
	if !ok {
		return lima.Extent{Start: start, Length: length, Allocated: true}, nil
	}
	e, err := s.BlockStatus(start, length)
	if err != nil {
		return lima.Extent{}, err
	}
	return lima.Extent{Start: e.Start, Length: e.Length, Allocated: e.Allocated, Zero: e.Zero, Compressed: e.Compressed}, nil
}
