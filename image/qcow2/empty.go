package qcow2

import (
	"fmt"

	"nvstore.dev/image"
)

// Empty drops all that is stored in the active disk, so that it reads as the
// backing file does, or as zeros. Snapshots stay. It is one write of the header:
// a crash leaves the disk as it was or empty, and no leaks. An image with an
// external data file is an image.ErrUnsupported.
func (im *Image) Empty() error {
	im.lockAll()
	defer im.unlockAll()
	if err := im.usable(true); err != nil {
		return err
	}
	if im.geo.external {
		return fmt.Errorf("qcow2: emptying an image with a data file: %w", image.ErrUnsupported)
	}
	if err := im.restructure(im.emptyL1); err != nil {
		return err
	}
	im.unpacked.reset()
	return nil
}

func (im *Image) emptyL1() error {
	old, at := im.l1, im.hdr.l1Off
	if err := im.newL1(make([]uint64, len(old))); err != nil {
		return err
	}
	if err := im.dropTables(old); err != nil {
		return err
	}
	return im.releaseL1(at, uint64(len(old)))
}
