package qcow2

import (
	"fmt"
	"io"

	"nvstore.dev/image"
)

// below tells that clusters may be unallocated here and yet not be zeros.
func (im *Image) below() bool { return im.hdr.backingOff != 0 }

// readBelow reads what the backing file has at guest. Past its end there are
// zeros.
func (im *Image) readBelow(p []byte, guest uint64) error {
	if !im.below() {
		clear(p)
		return nil
	}
	if im.backing == nil {
		return fmt.Errorf("qcow2: reading what only the backing file %q has, which isn't open: %w",
			im.hdr.backing, image.ErrUnsupported)
	}
	size := uint64(im.backing.Size())
	if guest >= size {
		clear(p)
		return nil
	}
	n := min(uint64(len(p)), size-guest)
	k, err := im.backing.ReadAt(p[:n], int64(guest))
	if err != nil && err != io.EOF {
		return fmt.Errorf("qcow2: backing file: %w", err)
	}
	clear(p[k:])
	return nil
}

// zeroBelow tells that the backing file has nothing but zeros at [guest,
// guest+n), as far as that is known without reading it.
func (im *Image) zeroBelow(guest, n uint64) bool {
	if !im.below() {
		return true
	}
	if im.backing == nil {
		return false
	}
	size := uint64(im.backing.Size())
	if guest >= size {
		return true
	}
	b, ok := image.As[image.BlockStatuser](im.backing)
	if !ok {
		return false
	}
	n = min(n, size-guest)
	x, err := b.BlockStatus(int64(guest), int64(n))
	return err == nil && x.Zero && uint64(x.Length) >= n
}

// statusBelow describes bytes from off, which this image doesn't store.
func (im *Image) statusBelow(off, n int64) (image.Extent, error) {
	x := image.Extent{Start: off, Length: n, Zero: !im.below(), Offset: -1}
	if im.backing == nil {
		return x, nil
	}
	size := im.backing.Size()
	if off >= size {
		// QEMU too takes the zeros behind the end for the backing
		// file's own.
		x.Zero, x.Allocated, x.Depth = true, true, 1
		return x, nil
	}
	n = min(n, size-off)
	b, ok := image.As[image.BlockStatuser](im.backing)
	if !ok {
		x.Length, x.Allocated, x.Depth, x.Offset = n, true, 1, off
		return x, nil
	}
	x, err := b.BlockStatus(off, n)
	if err != nil {
		return image.Extent{}, fmt.Errorf("qcow2: backing file: %w", err)
	}
	x.Depth++
	return x, nil
}

// ChangeBacking makes name and format those of the backing file in the header,
// or, with an empty name, makes the image one without. backing is what is read
// from then on; it may be nil, as with OpenOptions.NoBacking. The device that
// was the backing file so far is closed. No data is copied: it is the caller's
// business that the disk reads as it should. The change is durable when it
// returns, and a crash leaves the old header or the new one. A header without
// room for the name is an image.ErrNoSpace.
func (im *Image) ChangeBacking(name, format string, backing image.Device) error {
	im.lockAll()
	defer im.unlockAll()
	if err := im.usable(true); err != nil {
		return err
	}
	switch {
	case len(name) > maxBackingName, len(format) > maxBackingFormat:
		return fmt.Errorf("qcow2: a backing file name of %d bytes with a format of %d, above 1023 and 15: %w",
			len(name), len(format), image.ErrOutOfRange)
	case name == "" && (format != "" || backing != nil):
		return fmt.Errorf("qcow2: a backing file without a name: %w", image.ErrOutOfRange)
	case name != "" && im.hdr.rawData():
		return fmt.Errorf("qcow2: a backing file beside a raw data file: %w", image.ErrUnsupported)
	}
	if err := im.flushAll(); err != nil {
		return err
	}
	old := *im.hdr
	im.hdr.backing = name
	im.hdr.exts = setBackingFormat(old.exts, format)
	if err := im.rewriteHeader(); err != nil {
		*im.hdr = old
		return err
	}
	former := im.backing
	im.backing = backing
	im.opts.Backing, im.opts.NoBacking = backing, true
	if former != nil && former != backing {
		return former.Close()
	}
	return nil
}

// setBackingFormat returns exts with another backing format, in front.
func setBackingFormat(exts []Extension, format string) []Extension {
	var out []Extension
	if format != "" {
		out = append(out, Extension{extBackingFormat, []byte(format)})
	}
	for _, x := range exts {
		if x.Type != extBackingFormat {
			out = append(out, x)
		}
	}
	return out
}
