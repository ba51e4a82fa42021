package nbd

import (
	"fmt"

	"nvstore.dev/image"
)

// maxRange is how much one request without a payload covers: a server that
// has to write zeros answers within the timeout.
const maxRange = 64 << 20

// ZeroOptions say how WriteZeroesWith does it. Nil is the zero value.
type ZeroOptions struct {
	NoHole  bool // keep the range allocated, so that later writes find space
	Fast    bool // fail with image.ErrUnsupported unless it is faster than writing
	Durable bool // as WriteDurable
}

// WriteZeroes makes a range read as zeros. The server may make a hole of it.
func (d *Device) WriteZeroes(off, n int64) error { return d.WriteZeroesWith(off, n, nil) }

// WriteZeroesWith is WriteZeroes with options. Without the server's help it
// writes zeros.
func (d *Device) WriteZeroesWith(off, n int64, o *ZeroOptions) error {
	if o == nil {
		o = &ZeroOptions{}
	}
	if err := d.writable(off, n); err != nil || n == 0 {
		return err
	}
	if o.Fast && !d.info.FastZero {
		return fmt.Errorf("nbd: fast zeroes: %w", image.ErrUnsupported)
	}
	fua := d.fua || o.Durable && d.info.FUA
	if err := d.zeroParts(off, n, o, fua); err != nil {
		return err
	}
	if o.Durable && !fua {
		return d.Sync()
	}
	return nil
}

// zeroParts zeroes whole blocks by one request, and writes the parts of blocks
// at the range's ends.
func (d *Device) zeroParts(off, n int64, o *ZeroOptions, fua bool) error {
	lo, hi := d.inner(off, n)
	if !d.info.WriteZeroes || lo >= hi {
		if o.Fast {
			return fmt.Errorf("nbd: fast zeroes of a part of a block: %w", image.ErrUnsupported)
		}
		return d.writeNulls(off, n, fua)
	}
	flags := fuaFlag(fua)
	if o.NoHole {
		flags |= cmdFlagNoHole
	}
	if o.Fast {
		flags |= cmdFlagFastZero
	}
	if err := d.ranged(cmdWriteZeroes, flags, lo, hi-lo); err != nil {
		return err
	}
	if err := d.writeNulls(off, lo-off, fua); err != nil {
		return err
	}
	return d.writeNulls(hi, off+n-hi, fua)
}

// inner returns the whole blocks inside a range.
func (d *Device) inner(off, n int64) (lo, hi int64) {
	unit := d.info.MinBlock
	return (off + unit - 1) &^ (unit - 1), (off + n) &^ (unit - 1)
}

func (d *Device) writeNulls(off, n int64, fua bool) error {
	if n == 0 {
		return nil
	}
	nulls := make([]byte, min(n, d.piece))
	for n > 0 {
		k := min(n, int64(len(nulls)))
		if err := d.writeParts(nulls[:k], off, fua); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// ranged carries out a request without a payload on whole blocks.
func (d *Device) ranged(cmd, flags uint16, off, n int64) error {
	if d.info.MinBlock > 1 {
		d.units.RLock()
		defer d.units.RUnlock()
	}
	return d.use(cmd == cmdCache, func(c *conn) error {
		return transfer(c, n, maxRange, func(lo, n int64) request {
			return request{cmd: cmd, flags: flags, off: off + lo, n: n}
		})
	})
}

// Discard is a TRIM of the whole blocks in a range. Where the server knows no
// TRIM, it does nothing.
func (d *Device) Discard(off, n int64) error {
	if err := d.writable(off, n); err != nil {
		return err
	}
	lo, hi := d.inner(off, n)
	if !d.info.Trim || lo >= hi {
		return nil
	}
	return d.ranged(cmdTrim, fuaFlag(d.fua), lo, hi-lo)
}

// Prefetch tells the server that a range will be read (CACHE). It does nothing
// where the server doesn't know that.
func (d *Device) Prefetch(off, n int64) error {
	if err := d.alive(true); err != nil {
		return err
	}
	if err := image.CheckRange(off, n, d.info.Size); err != nil {
		return err
	}
	unit := d.info.MinBlock
	lo, hi := off&^(unit-1), (off+n+unit-1)&^(unit-1)
	if !d.info.Cache || n == 0 {
		return nil
	}
	return d.ranged(cmdCache, 0, lo, hi-lo)
}

// BlockStatus tells what base:allocation says of the first run of bytes from
// off on. Without it, everything is data. Offset is always -1.
func (d *Device) BlockStatus(off, n int64) (image.Extent, error) {
	if n <= 0 {
		return image.Extent{}, image.ErrOutOfRange
	}
	if err := d.alive(true); err != nil {
		return image.Extent{}, err
	}
	if err := image.CheckRange(off, n, d.info.Size); err != nil {
		return image.Extent{}, err
	}
	e := image.Extent{Start: off, Length: n, Allocated: true, Offset: -1}
	if !d.info.Allocation {
		return e, nil
	}
	unit := d.info.MinBlock
	lo, hi := off&^(unit-1), (off+n+unit-1)&^(unit-1)
	err := d.use(true, func(c *conn) error {
		flags, length, err := c.status(lo, min(hi-lo, maxStatusBytes))
		if length&(unit-1) != 0 {
			// A part of a block can't be asked about, so it counts
			// for what the rest of the block may be.
			if length &^= unit - 1; length == 0 {
				length, flags = unit, 0
			}
		}
		e.Length = min(n, lo+length-off)
		e.Allocated, e.Zero = flags&stateHole == 0, flags&stateZero != 0
		return err
	})
	if err != nil {
		return image.Extent{}, err
	}
	return e, nil
}
