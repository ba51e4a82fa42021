package qcow2

import (
	"bytes"
	"encoding/binary"

	"nvstore.dev/image"
)

// Header extension types (docs/interop/qcow2.txt, "Header extensions").
const (
	extEnd           = 0
	extBackingFormat = 0xe2792aca
	extFeatureNames  = 0x6803f857
	extBitmaps       = 0x23852875
	extEncryption    = 0x0537be77
	extDataFile      = 0x44415441
)

const featureEntry = 48 // bytes of one entry of the feature name table

// An Extension is one header extension. Type 0 ends the list on disk and
// can't be one; the image's header, feature name table, all extensions and
// the terminator must fit in one cluster.
type Extension struct {
	Type uint32
	Data []byte
}

// parseExtensions reads the extensions between the header and the backing
// file name, or the end of the cluster.
func (h *header) parseExtensions(b []byte, f fieldError) error {
	end := h.clusterSize()
	if h.backingOff != 0 {
		end = h.backingOff
	}
	f.name = "qcow2 header extension"
	for off := uint64(h.headerLen); end-off >= 8; {
		typ := binary.BigEndian.Uint32(b[off:])
		n := uint64(binary.BigEndian.Uint32(b[off+4:]))
		if typ == extEnd {
			return nil
		}
		if n > end-off-8 {
			return f.at(int64(off+4), "length", n, "inside the header cluster", image.ErrFormat)
		}
		if _, dup := findExtension(h.exts, typ); dup && knownExtension(typ) {
			return f.at(int64(off), "type", typ, "each type once", image.ErrCorrupt)
		}
		data := b[off+8:][:n]
		if err := checkExtension(typ, data, int64(off), f); err != nil {
			return err
		}
		h.exts = append(h.exts, Extension{Type: typ, Data: bytes.Clone(data)})
		off += 8 + (n+7)&^7
		if off > end {
			return nil // the last padding may be cut off
		}
	}
	return nil
}

func knownExtension(typ uint32) bool {
	switch typ {
	case extBackingFormat, extFeatureNames, extBitmaps, extEncryption, extDataFile:
		return true
	}
	return false
}

// checkExtension validates the fixed lengths of the types that have one.
func checkExtension(typ uint32, data []byte, off int64, f fieldError) error {
	switch typ {
	case extBitmaps:
		if len(data) != 24 {
			return f.at(off+4, "length", len(data), "24 for bitmaps", image.ErrFormat)
		}
	case extEncryption:
		if len(data) != 16 {
			return f.at(off+4, "length", len(data), "16 for the encryption header", image.ErrFormat)
		}
	}
	return nil
}

func findExtension(exts []Extension, typ uint32) (Extension, bool) {
	for _, x := range exts {
		if x.Type == typ {
			return x, true
		}
	}
	return Extension{}, false
}

func appendExtensions(b []byte, exts []Extension) []byte {
	for _, x := range exts {
		b = binary.BigEndian.AppendUint32(b, x.Type)
		b = binary.BigEndian.AppendUint32(b, uint32(len(x.Data)))
		b = append(b, x.Data...)
		b = append(b, make([]byte, -len(x.Data)&7)...)
	}
	return append(b, make([]byte, 8)...)
}

// featureTable is the feature name table that QEMU writes too.
func featureTable() Extension {
	var b []byte
	for _, f := range []struct {
		typ, bit byte
		name     string
	}{
		{0, 0, "dirty bit"},
		{0, 1, "corrupt bit"},
		{0, 2, "external data file"},
		{0, 3, "compression type"},
		{0, 4, "extended L2 entries"},
		{1, 0, "lazy refcounts"},
		{2, 0, "bitmaps"},
		{2, 1, "raw external data"},
	} {
		e := make([]byte, featureEntry)
		e[0], e[1] = f.typ, f.bit
		copy(e[2:], f.name)
		b = append(b, e...)
	}
	return Extension{Type: extFeatureNames, Data: b}
}

func cString(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}
