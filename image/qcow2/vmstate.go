package qcow2

import (
	"encoding/binary"
	"fmt"
	"io"
	"time"

	"nvstore.dev/image"
)

// A SnapshotSpec is a snapshot to take (Image.TakeSnapshot).
type SnapshotSpec struct {
	// Name is 1 to 255 bytes, and no ID or name of another snapshot.
	Name string

	// ID is likewise. Empty means one more than the largest number that is
	// an ID, as QEMU has it.
	ID string

	// Time is when it was taken; the zero value is now.
	Time time.Time

	// VMState is how many bytes of what WriteVMState wrote belong to the
	// snapshot. All of it is gone from the active state afterwards.
	VMState int64

	// VMClock is how long the guest has run.
	VMClock time.Duration

	// ICount is the guest's instruction count, if it has one.
	ICount *int64
}

// TakeSnapshot takes a snapshot of the disk, and of a VM's state that was
// written before.
func (im *Image) TakeSnapshot(spec *SnapshotSpec) error {
	im.mu.Lock()
	defer im.mu.Unlock()
	if err := im.usable(true); err != nil {
		return err
	}
	s, err := im.newSnapshot(spec)
	if err != nil {
		return err
	}
	return im.restructureAside(func() error { return im.createSnapshot(s) }, nil)
}

// newSnapshot makes an entry of the snapshot table.
func (im *Image) newSnapshot(spec *SnapshotSpec) (*snapshot, error) {
	h := im.hdr
	for _, tag := range []string{spec.Name, spec.ID} {
		switch {
		case tag == spec.Name && tag == "", len(tag) > maxNameLen:
			return nil, fmt.Errorf("qcow2: a snapshot name of %d bytes: %w", len(tag), image.ErrUnsupported)
		case tag != "" && im.findSnapshot(tag) >= 0:
			return nil, fmt.Errorf("qcow2: snapshot %q: %w", tag, image.ErrExist)
		}
	}
	room := uint64(len(im.l1))<<(im.geo.bits+im.geo.l2Bits) - im.vmBase(h.size)
	switch {
	case h.incompat&incompatDataFile != 0:
		return nil, fmt.Errorf("qcow2: a snapshot of an image with a data file: %w", image.ErrUnsupported)
	case len(im.snaps) >= maxSnapshots:
		return nil, fmt.Errorf("qcow2: more than %d snapshots: %w", maxSnapshots, image.ErrNoSpace)
	case spec.VMState < 0, spec.VMState > 0 && uint64(spec.VMState) > room:
		return nil, fmt.Errorf("qcow2: a VM state of %d bytes that wasn't written: %w", spec.VMState, image.ErrOutOfRange)
	case im.geo.version == 2 && spec.VMState > 1<<32-1:
		return nil, fmt.Errorf("qcow2: a VM state of %d bytes in version 2: %w", spec.VMState, image.ErrUnsupported)
	}
	at := spec.Time
	if at.IsZero() {
		at = time.Now()
	}
	s := &snapshot{
		l1Off: h.l1Off, l1Size: h.l1Size, id: spec.ID, name: spec.Name,
		sec: uint32(at.Unix()), nsec: uint32(at.Nanosecond()), clock: uint64(spec.VMClock),
		extra: make([]byte, 24),
	}
	if s.id == "" {
		s.id = im.nextID()
	}
	if spec.VMState <= 1<<32-1 {
		s.vmSize = uint32(spec.VMState)
	}
	count := uint64(1<<64 - 1) // none
	if spec.ICount != nil {
		count = uint64(*spec.ICount)
	}
	binary.BigEndian.PutUint64(s.extra, uint64(spec.VMState))
	binary.BigEndian.PutUint64(s.extra[8:], h.size)
	binary.BigEndian.PutUint64(s.extra[16:], count)
	return s, nil
}

// vmBase is where a VM's state begins, as an offset on the disk: behind what
// the L1 entries of a disk of size bytes map.
func (im *Image) vmBase(size uint64) uint64 {
	return im.geo.l1Entries(size) << (im.geo.bits + im.geo.l2Bits)
}

// WriteVMState writes a part of a VM's state, which lies behind the end of the
// disk until a snapshot takes it. It isn't durable before that.
func (im *Image) WriteVMState(p []byte, off int64) (int, error) {
	im.lockAll()
	defer im.unlockAll()
	if err := im.usable(true); err != nil {
		return 0, err
	}
	base := im.vmBase(im.hdr.size)
	end := base + uint64(off) + uint64(len(p))
	if off < 0 || end > 1<<63-1 || im.geo.l1Entries(end) > maxL1Bytes/8 {
		return 0, fmt.Errorf("qcow2: a VM state up to byte %d needs an L1 table above 32 MiB: %w",
			uint64(off)+uint64(len(p)), image.ErrOutOfRange)
	}
	if n := im.geo.l1Entries(end); n > uint64(len(im.l1)) {
		n = min((n+63)&^63, maxL1Bytes/8)
		if err := im.restructure(func() error { return im.growL1(n, im.hdr.size) }); err != nil {
			return 0, err
		}
	}
	return im.write(p, int64(base)+off)
}

// VMState returns the VM's state in a snapshot, for reading as long as the
// snapshot is there.
func (im *Image) VMState(tag string) (*io.SectionReader, error) {
	im.mu.RLock()
	defer im.mu.RUnlock()
	if err := im.usable(false); err != nil {
		return nil, err
	}
	i := im.findSnapshot(tag)
	if i < 0 {
		return nil, fmt.Errorf("qcow2: snapshot %q: %w", tag, image.ErrNotFound)
	}
	s := im.snaps[i]
	n := s.vmState()
	base := im.vmBase(s.diskSize(im.hdr.size))
	if n > 1<<63-1 || n > 0 && im.geo.l1Entries(base+n) > uint64(s.l1Size) {
		return nil, fieldError{im.path, "qcow2 snapshot table"}.at(s.at, "vm_state_size", n,
			"a state that the L1 table covers", image.ErrCorrupt)
	}
	return io.NewSectionReader(stateReader{im, s.id, s.name, base}, 0, int64(n)), nil
}

// A stateReader reads behind the disk of a snapshot.
type stateReader struct {
	im       *Image
	id, name string
	base     uint64
}

func (r stateReader) ReadAt(p []byte, off int64) (int, error) {
	im := r.im
	im.mu.RLock()
	defer im.mu.RUnlock()
	if err := im.usable(false); err != nil {
		return 0, err
	}
	i := im.findSnapshot(r.id)
	if i < 0 || im.snaps[i].name != r.name {
		return 0, fmt.Errorf("qcow2: snapshot %q: %w", r.name, image.ErrNotFound)
	}
	for done := 0; done < len(p); {
		at := r.base + uint64(off) + uint64(done)
		n := min(uint64(len(p)-done), im.geo.cs-at&(im.geo.cs-1))
		if err := im.readSnapshotCluster(im.snaps[i], p[done:][:n], at); err != nil {
			return done, err
		}
		done += int(n)
	}
	return len(p), nil
}

// readSnapshotCluster reads a part of one cluster, by the tables of a snapshot.
func (im *Image) readSnapshotCluster(s *snapshot, p []byte, at uint64) error {
	i, k, in := im.geo.split(int64(at))
	if i >= uint64(s.l1Size) {
		return im.badEntry("L1 table", s.l1Off+i*8, nil, "an entry for each byte of the VM's state")
	}
	l1, err := im.readEntries(s.l1Off+i*8, 1)
	if err != nil {
		return err
	}
	off, bad := im.geo.decodeL1(l1[0])
	switch {
	case bad != nil && bad.fatal:
		return im.badEntry("L1 table", s.l1Off+i*8, l1[0], bad.want)
	case off == 0:
		clear(p)
		return nil
	case off >= im.fileEnd():
		return im.badEntry("L1 table", s.l1Off+i*8, l1[0], "a table inside the file")
	}
	b := make([]byte, im.geo.entrySize())
	if err := readFile(im.file, b, off+k*uint64(len(b))); err != nil {
		return err
	}
	v := im.geo.get(b, 0)
	e, bad := im.geo.decode(v)
	if bad != nil && bad.fatal {
		return im.badEntry("L2 table", off+k*uint64(len(b)), v.word, bad.want)
	}
	return im.readEntry(p, e, in, at)
}

// readEntry reads a part of a cluster that has nothing below it.
func (im *Image) readEntry(p []byte, e entry, in, at uint64) error {
	switch {
	case e.kind == compressed:
		return im.unpacked.read(im, e, p, in)
	case !e.placed:
		clear(p)
		return nil
	}
	for len(p) > 0 {
		n := min(uint64(len(p)), 1<<im.geo.subBits-in&(1<<im.geo.subBits-1))
		if e.sub(uint32(in>>im.geo.subBits)) != normal {
			clear(p[:n])
		} else if err := im.inFile(e.host+in, n); err != nil {
			return err
		} else if err := im.readData(p[:n], e.host+in, at); err != nil {
			return err
		}
		p, in, at = p[n:], in+n, at+n
	}
	return nil
}
