package qcow2

import (
	"encoding/binary"

	"nvstore.dev/image"
)

// maxCryptHeader bounds the encryption header. LUKS1 headers are about 2 MiB.
const maxCryptHeader = 64 << 20

// unlock gets the cipher of an encrypted image.
func (im *Image) unlock(get func(image.Device, int) (image.SectorCipher, error)) (image.SectorCipher, error) {
	if im.hdr.crypt == cryptAES {
		return get(nil, cryptAES)
	}
	off, n, err := im.hdr.cryptHeader(im.path, uint64(im.file.Size()))
	if err != nil {
		return nil, err
	}
	w, err := image.Window(borrowed{im.file}, int64(off), int64(n))
	if err != nil {
		return nil, err
	}
	c, err := get(w, cryptLUKS)
	if err == nil && c == nil {
		err = fieldError{im.path, "qcow2 header"}.at(32, "crypt_method", im.hdr.crypt, "a cipher from Unlock", image.ErrUnsupported)
	}
	return c, err
}

// cryptHeader returns where the encryption header is (docs/interop/qcow2.txt,
// "Full disk encryption header pointer").
func (h *header) cryptHeader(path string, fileSize uint64) (off, n uint64, err error) {
	f := fieldError{path, "qcow2 encryption header pointer"}
	x, ok := findExtension(h.exts, extEncryption)
	if !ok {
		return 0, 0, f.at(-1, "", nil, "the extension, as the image is encrypted with LUKS", image.ErrCorrupt)
	}
	off, n = binary.BigEndian.Uint64(x.Data), binary.BigEndian.Uint64(x.Data[8:])
	switch g := newGeometry(h); {
	case off == 0 || off&(g.cs-1) != 0 || off >= maxHostOffset:
		return 0, 0, f.at(-1, "offset", off, "a cluster behind the header's", image.ErrCorrupt)
	case n == 0 || n > maxCryptHeader || off > fileSize || n > fileSize-off:
		return 0, 0, f.at(-1, "length", n, "at most 64 MiB, inside the file", image.ErrCorrupt)
	}
	return off, n, nil
}

// borrowed is a device that its user doesn't close.
type borrowed struct{ image.Device }

func (b borrowed) Close() error         { return nil }
func (b borrowed) Unwrap() image.Device { return b.Device }
