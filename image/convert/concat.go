package convert

import (
	"errors"
	"io"
	"sort"

	"nvstore.dev/image"
)

// sector is what the parts of a Concat are rounded up to.
const sector = 512

// Concat joins devices, one behind the other, into one for reading. Each but
// the last is padded with zeros to a multiple of 512 bytes. Close closes all
// of them.
func Concat(devs ...image.Device) image.Device {
	c := &concat{devs: devs, starts: make([]int64, len(devs))}
	for i, d := range devs {
		c.size = roundUp(c.size, sector)
		c.starts[i] = c.size
		c.size += d.Size()
	}
	return c
}

type concat struct {
	devs   []image.Device
	starts []int64
	size   int64
}

func (c *concat) Size() int64 { return c.size }

// part returns the device that has off, or its padding, and where it ends with
// it.
func (c *concat) part(off int64) (i int, end int64) {
	i = sort.Search(len(c.starts), func(i int) bool { return c.starts[i] > off }) - 1
	// Of devices without any bytes, the last one isn't meant.
	if i+1 < len(c.starts) {
		return i, c.starts[i+1]
	}
	return i, c.size
}

func (c *concat) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, image.ErrOutOfRange
	}
	done := 0
	for done < len(p) && off < c.size {
		i, end := c.part(off)
		b := p[done:min(int64(len(p)), int64(done)+end-off)]
		if _, err := readPart(c.devs[i], b, off-c.starts[i]); err != nil {
			return done, err
		}
		done += len(b)
		off += int64(len(b))
	}
	if done < len(p) {
		return done, io.EOF
	}
	return done, nil
}

func (c *concat) BlockStatus(off, n int64) (image.Extent, error) {
	if n == 0 {
		return image.Extent{}, image.ErrOutOfRange
	}
	if err := image.CheckRange(off, n, c.size); err != nil {
		return image.Extent{}, err
	}
	i, end := c.part(off)
	d, at := c.devs[i], off-c.starts[i]
	if at >= d.Size() {
		return image.Extent{Start: off, Length: min(n, end-off), Zero: true, Offset: -1}, nil
	}
	e, err := newProber(d).status(at, min(n, d.Size()-at))
	e.Start, e.Offset = off, -1
	return e, err
}

func (c *concat) WriteAt(p []byte, off int64) (int, error) { return 0, image.ErrReadOnly }
func (c *concat) Sync() error                              { return nil }

func (c *concat) Close() error {
	var err error
	for _, d := range c.devs {
		err = errors.Join(err, d.Close())
	}
	return err
}
