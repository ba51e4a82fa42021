package qcow2

import (
	"encoding/binary"

	"nvstore.dev/image"
)

// A snapshot is an entry of the snapshot table (docs/interop/qcow2.txt,
// "Snapshots").
type snapshot struct {
	at     int64 // offset of the entry in the file, if it was read
	l1Off  uint64
	l1Size uint32
	sec    uint32
	nsec   uint32
	clock  uint64
	vmSize uint32
	extra  []byte // 64-bit VM state size, disk size, icount, and unknown bytes
	id     string
	name   string
}

const snapHeader = 40

func (s *snapshot) vmState() uint64 {
	if len(s.extra) >= 8 {
		return binary.BigEndian.Uint64(s.extra)
	}
	return uint64(s.vmSize)
}

// diskSize is the disk's size when the snapshot was taken, which old entries
// don't record.
func (s *snapshot) diskSize(now uint64) uint64 {
	if len(s.extra) >= 16 {
		return binary.BigEndian.Uint64(s.extra[8:])
	}
	return now
}

func (s *snapshot) length() uint64 {
	return uint64(snapHeader + len(s.extra) + len(s.id) + len(s.name))
}

func (s *snapshot) append(b []byte) []byte {
	be := binary.BigEndian
	b = be.AppendUint64(b, s.l1Off)
	b = be.AppendUint32(b, s.l1Size)
	b = be.AppendUint16(b, uint16(len(s.id)))
	b = be.AppendUint16(b, uint16(len(s.name)))
	b = be.AppendUint32(b, s.sec)
	b = be.AppendUint32(b, s.nsec)
	b = be.AppendUint64(b, s.clock)
	b = be.AppendUint32(b, s.vmSize)
	b = be.AppendUint32(b, uint32(len(s.extra)))
	b = append(b, s.extra...)
	b = append(b, s.id...)
	return append(b, s.name...)
}

// encodeSnapshots returns the table. The last entry needs no padding.
func encodeSnapshots(snaps []*snapshot) []byte {
	var b []byte
	for _, s := range snaps {
		b = append(b, make([]byte, -len(b)&7)...)
		b = s.append(b)
	}
	return b
}

// snapTableSize is how long the table is.
func snapTableSize(snaps []*snapshot) uint64 {
	var n uint64
	for _, s := range snaps {
		n = (n+7)&^7 + s.length()
	}
	return n
}

// readSnapshots reads the snapshot table. What the entries refer to isn't
// looked at.
func (im *Image) readSnapshots(h *header) ([]*snapshot, error) {
	f := fieldError{im.path, "qcow2 snapshot table"}
	var snaps []*snapshot
	off := h.snapsOff
	for range h.nbSnaps {
		off = (off-h.snapsOff+7)&^7 + h.snapsOff
		s, err := readSnapshot(im.file, off, f)
		if err != nil {
			return nil, err
		}
		if off += s.length(); off-h.snapsOff > maxSnapTable {
			return nil, f.at(s.at, "", off-h.snapsOff, "at most 64 MiB of snapshots", image.ErrFormat)
		}
		snaps = append(snaps, s)
	}
	return snaps, nil
}

func readSnapshot(file image.Device, off uint64, f fieldError) (*snapshot, error) {
	var b [snapHeader]byte
	if off+snapHeader > uint64(file.Size()) {
		return nil, f.at(int64(off), "", file.Size(), "an entry inside the file", image.ErrCorrupt)
	}
	if err := readFile(file, b[:], off); err != nil {
		return nil, err
	}
	be := binary.BigEndian
	s := &snapshot{
		at: int64(off), l1Off: be.Uint64(b[0:]), l1Size: be.Uint32(b[8:]),
		sec: be.Uint32(b[16:]), nsec: be.Uint32(b[20:]), clock: be.Uint64(b[24:]),
		vmSize: be.Uint32(b[32:]),
	}
	extra, id, name := be.Uint32(b[36:]), be.Uint16(b[12:]), be.Uint16(b[14:])
	if extra > maxSnapExtra {
		return nil, f.at(s.at+36, "extra_data_size", extra, "at most 1024", image.ErrFormat)
	}
	rest := make([]byte, uint64(extra)+uint64(id)+uint64(name))
	if off+snapHeader+uint64(len(rest)) > uint64(file.Size()) {
		return nil, f.at(s.at, "", file.Size(), "an entry inside the file", image.ErrCorrupt)
	}
	if err := readFile(file, rest, off+snapHeader); err != nil {
		return nil, err
	}
	s.extra = rest[:extra:extra]
	s.id = string(rest[extra:][:id])
	s.name = string(rest[extra+uint32(id):])
	return s, nil
}
