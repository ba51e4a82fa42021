package qcow2

import (
	"encoding/binary"
	"errors"
	"slices"

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

// iCount is the guest's instruction count, if it has one.
func (s *snapshot) iCount() *int64 {
	if len(s.extra) < 24 {
		return nil
	}
	n := int64(binary.BigEndian.Uint64(s.extra[16:]))
	if n < 0 {
		return nil
	}
	return &n
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
	im.snapsChanged = slices.ContainsFunc(h.lost, func(bad *image.FormatError) bool { return bad.Field == "nb_snapshots" })
	for range h.nbSnaps {
		off = (off-h.snapsOff+7)&^7 + h.snapsOff
		s, n, err := readSnapshot(im.file, off, f, im.repairing)
		if off += n; err == nil && off-h.snapsOff > maxSnapTable {
			err = f.at(s.at, "", off-h.snapsOff, "at most 64 MiB of snapshots", image.ErrFormat)
		}
		if err != nil && im.repairing && errors.As(err, new(*image.FormatError)) {
			im.snapsChanged = true
			return snaps, nil // the rest can't be found
		}
		if err != nil {
			return nil, err
		}
		if im.repairing && !im.mendSnapshot(s, h) {
			continue
		}
		im.snapsChanged = im.snapsChanged || n != s.length()
		snaps = append(snaps, s)
	}
	return snaps, nil
}

// mendSnapshot completes the extra data that version 3 asks for. It says false
// of an entry that is none.
func (im *Image) mendSnapshot(s *snapshot, h *header) bool {
	if s.id == "" && s.name == "" && s.l1Size == 0 {
		im.snapsChanged = true
		return false
	}
	if h.version >= 3 && len(s.extra) < 16 {
		s.complete(h.size)
	}
	return true
}

// complete adds what QEMU adds to the extra data of an old entry.
func (s *snapshot) complete(size uint64) {
	extra := make([]byte, 24)
	binary.BigEndian.PutUint64(extra, s.vmState())
	binary.BigEndian.PutUint64(extra[8:], s.diskSize(size))
	binary.BigEndian.PutUint64(extra[16:], 1<<64-1) // no instruction count
	s.extra = append(extra[:24:24], s.extra[min(24, len(s.extra)):]...)
}

// readSnapshot also returns the length of the entry in the file: with long, too
// much extra data is cut off.
func readSnapshot(file image.Device, off uint64, f fieldError, long bool) (*snapshot, uint64, error) {
	var b [snapHeader]byte
	if off+snapHeader > uint64(file.Size()) {
		return nil, 0, f.at(int64(off), "", file.Size(), "an entry inside the file", image.ErrCorrupt)
	}
	if err := readFile(file, b[:], off); err != nil {
		return nil, 0, err
	}
	be := binary.BigEndian
	s := &snapshot{
		at: int64(off), l1Off: be.Uint64(b[0:]), l1Size: be.Uint32(b[8:]),
		sec: be.Uint32(b[16:]), nsec: be.Uint32(b[20:]), clock: be.Uint64(b[24:]),
		vmSize: be.Uint32(b[32:]),
	}
	extra, id, name := be.Uint32(b[36:]), be.Uint16(b[12:]), be.Uint16(b[14:])
	length := snapHeader + uint64(extra) + uint64(id) + uint64(name)
	if extra > maxSnapExtra && !long {
		return nil, 0, f.at(s.at+36, "extra_data_size", extra, "at most 1024", image.ErrFormat)
	}
	if off+length > uint64(file.Size()) || length > maxSnapTable {
		return nil, 0, f.at(s.at, "", file.Size(), "an entry inside the file", image.ErrCorrupt)
	}
	s.extra = make([]byte, min(extra, maxSnapExtra))
	if err := readFile(file, s.extra, off+snapHeader); err != nil {
		return nil, 0, err
	}
	names := make([]byte, uint64(id)+uint64(name))
	if err := readFile(file, names, off+snapHeader+uint64(extra)); err != nil {
		return nil, 0, err
	}
	s.id, s.name = string(names[:id]), string(names[id:])
	return s, length, nil
}
