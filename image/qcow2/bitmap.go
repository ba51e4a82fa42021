package qcow2

import "encoding/binary"

// A bitmapsExt is the bitmaps header extension.
type bitmapsExt struct {
	count     uint32
	size, off uint64 // of the directory
}

// parseBitmapsExt decodes the extension, whose length was checked.
func parseBitmapsExt(b []byte) bitmapsExt {
	be := binary.BigEndian
	return bitmapsExt{be.Uint32(b), be.Uint64(b[8:]), be.Uint64(b[16:])}
}
