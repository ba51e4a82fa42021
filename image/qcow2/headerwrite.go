package qcow2

import (
	"bytes"
	"fmt"

	"nvstore.dev/image"
)

// area returns what follows the header's fixed part, which ends at byte at:
// extensions and the backing file name. It sets where the name lies.
func (h *header) area(at uint64) []byte {
	b := appendExtensions(nil, h.exts)
	off := uint64(0)
	if h.backing != "" {
		off = at + uint64(len(b))
		b = append(b, h.backing...)
	}
	h.backingSize = uint32(len(h.backing))
	if h.backingOff != off { // which requests that read look at
		h.backingOff = off
	}
	return b
}

// settleLength undoes a long header_length that rewriteHeader left in a crash.
// It shows as unknown fields that begin with hundreds of zeros.
func (h *header) settleLength() {
	const known = headerLenNew - headerLenV3 - 1
	if h.version < 3 || h.headerLen < headerLenNew {
		return
	}
	if h.headerLen > sector && len(bytes.Trim(h.tail[known:sector-headerLenV3-1], "\x00")) == 0 {
		h.headerLen, h.tail = headerLenNew, h.tail[:known]
	}
}

// rewriteHeader makes extensions and backing file name what im.hdr says, along
// with the rest of the header, and makes it durable. A crash leaves the old
// header or the new one: what doesn't fit the first sector is written where the
// cluster is unused, and header_length, which says where extensions begin, goes
// there and back with a write of the first sector each.
func (im *Image) rewriteHeader() error {
	h := im.hdr
	h.settleLength()
	now, err := im.loadTable(0)
	if err != nil {
		return err
	}
	at := uint64(h.headerLen)
	area := h.area(at)
	end := at + uint64(len(area))
	if end > im.geo.cs {
		return im.headerFull(end)
	}
	final := bytes.Clone(now)
	clear(final[at:])
	copy(final[at:], area)
	used := uint64(len(bytes.TrimRight(now, "\x00")))
	aside := (max(end, used) + sector - 1) &^ (sector - 1)
	switch {
	case end <= sector || bytes.Equal(now[sector:end], final[sector:end]):
		h.encodeFixed(final)
		return im.writeSector0(final)
	case h.version == 2:
		return im.rewriteV2(final, aside)
	}
	return im.rewriteAside(final, aside)
}

func (im *Image) headerFull(end uint64) error {
	return fmt.Errorf("qcow2: a header of %d bytes in a cluster of %d: %w", end, im.geo.cs, image.ErrNoSpace)
}

// rewriteAside is the case in which extensions go beyond the first sector.
func (im *Image) rewriteAside(final []byte, aside uint64) error {
	h, n := *im.hdr, im.hdr.headerLen
	tail := h.tail
	area := h.area(aside)
	if aside+uint64(len(area)) > im.geo.cs {
		return im.headerFull(aside + uint64(len(area)))
	}
	if err := im.writeFile(area, aside); err != nil {
		return err
	}
	if err := im.syncFile(); err != nil {
		return err
	}
	// The fields that aren't known stay, and are longer for a while.
	first := bytes.Clone(final[:aside])
	clear(first[n:])
	h.headerLen = uint32(aside)
	h.tail = append(bytes.Clone(tail), make([]byte, uint32(aside)-n)...)
	h.encodeFixed(first)
	if err := im.writeSector0(first); err != nil {
		return err
	}
	if err := im.writeFile(final[sector:aside], sector); err != nil {
		return err
	}
	if err := im.syncFile(); err != nil {
		return err
	}
	im.hdr.encodeFixed(final)
	if err := im.writeSector0(final); err != nil {
		return err
	}
	return im.writeFile(make([]byte, len(area)), aside)
}

// rewriteV2 leaves a backing file name outside of the first sector, where it
// must be anyway; there is no header_length to move.
func (im *Image) rewriteV2(final []byte, aside uint64) error {
	h := im.hdr
	at := h.headerLen + uint32(len(appendExtensions(nil, h.exts)))
	if at > sector || aside+uint64(len(h.backing)) > im.geo.cs {
		return im.headerFull(aside + uint64(len(h.backing)))
	}
	if err := im.writeFile([]byte(h.backing), aside); err != nil {
		return err
	}
	if err := im.syncFile(); err != nil {
		return err
	}
	h.backingOff = aside
	clear(final[at:sector])
	h.encodeFixed(final)
	return im.writeSector0(final)
}

// writeSector0 writes the start of the header's cluster, with one write that
// can't be torn, and makes it durable.
func (im *Image) writeSector0(b []byte) error {
	copy(im.sector0[:], b)
	if err := im.writeFile(im.sector0[:], 0); err != nil {
		return err
	}
	if err := im.syncFile(); err != nil {
		return err
	}
	im.hdr.moved = false
	return nil
}
