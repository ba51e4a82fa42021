package qcow2

import (
	"fmt"

	"nvstore.dev/image"
)

// showSnapshot makes the disk what it was at the snapshot that the options name,
// for reading.
func (im *Image) showSnapshot() error {
	tag := im.opts.Snapshot
	if !im.ro {
		return fmt.Errorf("qcow2: a snapshot opened for writing: %w", image.ErrUnsupported)
	}
	i := im.findSnapshot(tag)
	if i < 0 {
		return fmt.Errorf("qcow2: snapshot %q: %w", tag, image.ErrNotFound)
	}
	s := im.snaps[i]
	f := fieldError{im.path, "qcow2 snapshot table"}
	size := s.diskSize(im.hdr.size)
	n := im.geo.l1Entries(size)
	if size%sector != 0 || size > 1<<63-1 || n > uint64(s.l1Size) || n > maxL1Bytes/8 {
		return f.at(s.at, "disk_size", size, "a multiple of 512 that the L1 table covers", image.ErrCorrupt)
	}
	if im.geo.checkTable(s.l1Off, n*8) != "" || s.l1Off+n*8 > im.fileEnd() {
		return f.at(s.at, "l1_table_offset", s.l1Off, "a table inside the file", image.ErrCorrupt)
	}
	l1, err := im.readEntries(s.l1Off, n)
	if err != nil {
		return err
	}
	im.l1 = l1
	im.show()
	im.size.Store(int64(size))
	return nil
}
