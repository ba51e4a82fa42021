package qcow2

import (
	"bytes"
	"fmt"
	"slices"

	"nvstore.dev/image"
)

// SetExtension makes data that of the header extension of a type, which must
// be the caller's own; nil removes it. The change is durable when it returns,
// and a crash leaves the old header or the new one. A header without room is an
// image.ErrNoSpace.
func (im *Image) SetExtension(typ uint32, data []byte) error {
	im.lockAll()
	defer im.unlockAll()
	if err := im.usable(true); err != nil {
		return err
	}
	if typ == extEnd || knownExtension(typ) {
		return fmt.Errorf("qcow2: header extension %#x belongs to the format: %w", typ, image.ErrUnsupported)
	}
	if err := im.flushAll(); err != nil {
		return err
	}
	old := *im.hdr
	exts := slices.Clone(old.exts)
	i := slices.IndexFunc(exts, func(x Extension) bool { return x.Type == typ })
	switch {
	case data == nil:
		exts = slices.DeleteFunc(exts, func(x Extension) bool { return x.Type == typ })
	case i >= 0:
		exts[i].Data = bytes.Clone(data)
	default:
		exts = append(exts, Extension{typ, bytes.Clone(data)})
	}
	im.hdr.exts = exts
	if err := im.rewriteHeader(); err != nil {
		*im.hdr = old
		return err
	}
	return nil
}
